"""What is changed for a while is given back, whatever ends the block."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from glora.undo import undone


class Stop(BaseException):
    """As Ctrl-C is: no Exception."""


def undoing(*errors: BaseException | None) -> tuple[list[str], Callable[[], None]]:
    """What was done, and an undo that raises these errors, one each time it is run, before it is done."""
    done: list[str] = []
    left = list(errors)

    def undo() -> None:
        error = left.pop(0) if left else None
        if error is not None:
            raise error
        done.append("undone")

    return done, undo


def test_it_is_undone_as_the_block_ends_and_not_before() -> None:
    done, undo = undoing()
    with undone(undo):
        assert done == []
    assert done


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop, GeneratorExit])
def test_what_ends_the_block_comes_out_of_it(error: type[BaseException]) -> None:
    done, undo = undoing()
    raised = error("in the block")
    with pytest.raises(error) as found, undone(undo):
        raise raised
    assert found.value is raised
    assert done


@pytest.mark.parametrize("within", [None, ValueError("in the block")])
def test_an_undo_that_is_cut_off_is_done_again(within: Exception | None) -> None:
    done, undo = undoing(KeyboardInterrupt())

    def block() -> None:
        with undone(undo):
            if within is not None:
                raise within

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == ["undone"]
