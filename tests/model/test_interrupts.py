"""A call that is cut off, by Ctrl-C or for want of memory, at any line, has done all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import glora
from glora import fingerprint
from glora.search import Space
from tests.helpers.calls import attach
from tests.helpers.interrupts import READING, Interrupt, everything
from tests.helpers.marks import long
from tests.helpers.search import supernet

CREATE = glora.GLoRAConfig.glora(rank=1, init="random", create_bias=True)
X = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
POINTS = 250


@pytest.fixture(autouse=True)
def gradients() -> Generator[None]:
    """An exception as a `with torch.no_grad()` block ends is before its exit, which then never runs."""
    yield
    torch.set_grad_enabled(True)


def plain() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3)).eval()
    model[0].bias.requires_grad_(False)
    return model


def one() -> nn.Module:
    return attach(plain(), CREATE, targets=["0"], name="a").eval()


def two() -> nn.Module:
    """`b` alone is on layer 1, whose bias it creates, and has the head."""
    return attach(one(), CREATE, targets=["0", "1"], trainable=["2"], name="b").eval()


def entangled() -> nn.Module:
    """A supernet on both layers."""
    return supernet(plain(), Space(A=["vector", "none"], ranks=[1, 2]), name="a").eval()


def apply(model: nn.Module) -> object:
    return glora.apply(model, config=CREATE, trainable=["2"], name="c")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    glora.save(two(), directory, "b")
    return directory


def points(lines: list[tuple[str, int]]) -> list[int]:
    """The lines to raise before: every one, or as many as there is time for, with the first and last times of each.

    Lines that only look and decide count once.
    """
    first: dict[tuple[str, int], int] = {}
    last: dict[tuple[str, int], int] = {}
    for index, line in enumerate(lines, 1):
        first.setdefault(line, index)
        last[line] = index
    changing = [index for index, line in enumerate(lines, 1) if not line[0].startswith(READING)]
    stride = 1 + len(changing) // POINTS
    return sorted({*changing[::stride], *first.values(), *(last[lines[index - 1]] for index in changing)})


def cut_off_everywhere(
    make: Callable[[], nn.Module],
    call: Callable[[Any], object],
    error: type[BaseException] = KeyboardInterrupt,
    setup: Callable[[nn.Module], object] = lambda model: model,
) -> None:
    """Cut off `call(setup(model))` at line after line: the model is as before the setup, or as after the call."""

    def attempt(at: int | None) -> Interrupt:
        given = setup(model)
        fingerprint._remembered.clear()  # each attempt runs the same lines
        interrupt = Interrupt(at, error)
        torch.manual_seed(3)
        raised = interrupt.run(lambda: call(given))
        if type(raised) is not (error if at else type(None)):
            wrong.append(f"{interrupt.place}: {raised!r}")
        return interrupt

    wrong: list[str] = []
    first = model = make()
    attempt(None)  # what is imported and cached at the first time
    classes = [type(module) for module in first.modules()]  # the registry is weak: a class made again is more lines
    model = make()
    lines, done = attempt(None).lines, everything(model, X)
    undone, completed = [0], []
    model = before = None
    held: list[object] = []
    for at in points(lines):
        if model is None:
            model = make()
            before = everything(model, X, held)
        interrupt = attempt(at)
        after = everything(model, X, held)
        if after == before:
            undone.append(at)
            continue
        if everything(model, X) == done:
            completed.append(at)
        else:
            changed = [key for key in after if after[key] != cast("dict[str, Any]", before)[key]]
            wrong.append(f"{interrupt.place}: {changed} half done")
        model = None
    del classes
    assert not wrong, "\n".join(dict.fromkeys(wrong))
    # Behind the last change there is little more than a return.
    assert len(completed) <= 12, [lines[at - 1] for at in completed]
    assert not completed or max(undone) < min(completed)


CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]] = {
    "apply": (plain, apply),
    "apply another": (two, apply),
    "activate": (two, lambda model: glora.activate(model, {"a": 0.5})),
    "activate none": (two, lambda model: glora.activate(model, {})),
    "delete": (two, lambda model: glora.delete(model, "b")),
    "delete the last": (one, lambda model: glora.delete(model, "a")),
    "remove": (two, glora.remove),
    "extract": (entangled, lambda model: glora.search.extract(model, {"0": glora.GLoRAConfig.lora(rank=1)})),
}


# The plain command has one of each kind: what adds, what switches, what takes off.
SHORT = {"apply another", "activate", "remove"}


@pytest.mark.parametrize("name", [name if name in SHORT else long(name) for name in CALLS])
def test_a_change(name: str) -> None:
    cut_off_everywhere(*CALLS[name])


@pytest.mark.parametrize("make", [long(plain), one])
def test_load(make: Callable[[], nn.Module], saved: Path) -> None:
    cut_off_everywhere(make, lambda model: glora.load(model, saved, "c"), MemoryError)


CONTEXTS: dict[str, Callable[[nn.Module], AbstractContextManager[object]]] = {
    "merged": glora.merged,
    "disabled": glora.disabled,
    "route": lambda model: glora.route(model, ["a", None]),
}


# One that is cut off between the call and its `with` was not entered, and says so (Note [Forgotten with]).
@pytest.mark.filterwarnings("ignore:glora.* acts inside a `with` block alone:UserWarning")
@pytest.mark.parametrize("name", CONTEXTS)
def test_entering(name: str) -> None:
    contexts = []  # one that is dropped is left

    def enter(model: nn.Module) -> None:
        contexts.append(CONTEXTS[name](model))
        contexts[-1].__enter__()

    cut_off_everywhere(two, enter)
    for context in contexts:
        with suppress(RuntimeError):
            context.__exit__(None, None, None)


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("raised", [long(None), ValueError("in the block")], ids=["normally", "by an exception"])
def test_leaving(name: str, raised: Exception | None) -> None:
    def enter(model: nn.Module) -> AbstractContextManager[object]:
        context = CONTEXTS[name](model)
        context.__enter__()
        return context

    def leave(context: AbstractContextManager[object]) -> None:
        if raised is None:
            context.__exit__(None, None, None)
        else:
            fresh = ValueError(*raised.args)  # one for all would keep what was left last, until it is raised again
            with suppress(ValueError):
                context.__exit__(type(fresh), fresh, None)

    cut_off_everywhere(two, leave, setup=enter)
