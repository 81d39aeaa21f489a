"""What is changed for a while is given back, whatever ends the block."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import nn

import glora
from glora.undo import uncollected, undone


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


@pytest.fixture
def collector() -> Iterator[None]:
    """Python's garbage collector as it was before the test."""
    on = gc.isenabled()
    yield
    gc.enable() if on else gc.disable()


@pytest.mark.usefixtures("collector")
@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_garbage_collector_is_as_before(on: bool, error: type[BaseException] | None) -> None:
    gc.enable() if on else gc.disable()
    with contextlib.suppress(*[error] if error else []), uncollected():
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
        if error is not None:
            raise error
    assert gc.isenabled() is on


@pytest.mark.usefixtures("collector")
def test_calls_that_go_through_all_layers_are_not_collected(tmp_path: Path) -> None:
    gc.enable()
    plain, seen = nn.Sequential(*(nn.Linear(2, 2) for _ in range(100))), list[int]()
    same = nn.Sequential(*plain)  # the very layers

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    try:
        for call in (
            lambda: glora.apply(plain, config=glora.GLoRAConfig.glora()),
            lambda: glora.save(plain, tmp_path),
            lambda: glora.remove(plain),
            lambda: glora.load(same, tmp_path),
            lambda: glora.merge(same),
        ):
            gc.collect()  # what was made before is young no more
            seen.clear()
            call()
            assert len(seen) <= 2, seen  # before and after the block, where the collector is on
    finally:
        gc.callbacks.remove(note)
