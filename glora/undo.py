"""Giving back what was changed for a while, whatever ends the block."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Generator
from contextlib import (
    _GeneratorContextManager,  # pyright: ignore[reportPrivateUsage] - what contextmanager makes, and says more
    contextmanager,
)
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def undone(undo: Callable[[], None]) -> Generator[None]:
    """Run `undo` when the `with` block ends; twice, since Ctrl-C may cut the first run off in its midst."""
    try:
        try:
            yield
        finally:
            undo()
    finally:
        undo()


# Note [Garbage collector]
# Whenever many objects have been made, Python looks through all that there are for cycles that nobody refers to.
# Attaching an adapter to thousands of layers makes little but objects that stay: it takes a third longer by that, and
# nothing is found. So what goes through all layers does it with the collector off. Objects that nothing refers to go at
# once as ever, with their tensors; cycles go as the block has ended.
@contextmanager
def uncollected() -> Generator[None]:
    """Keep Python's garbage collector off inside the `with` block (Note [Garbage collector]), in every thread."""
    on = gc.isenabled()
    try:
        try:
            gc.disable()
            yield
        finally:
            if on:
                gc.enable()
    finally:  # twice, as `undone` does it
        if on:
            gc.enable()


# Note [Forgotten with]
# `glora.disabled(model)` reads like `model.eval()`, and alone does nothing: what follows runs as before, with no error.
# So, as Python does of a coroutine that is never awaited, these say it when they go without having been entered. One
# that decorates a function makes another of itself for each call, and is never entered itself.
class Block(_GeneratorContextManager[T]):
    """A context manager that warns if it is never entered (Note [Forgotten with])."""

    _used = True

    def __init__(self, function: Callable[..., Generator[T]], args: tuple[Any, ...], kwds: dict[str, Any]) -> None:
        super().__init__(function, args, kwds)
        self._name, self._used = function.__name__, False

    def __enter__(self) -> T:
        self._used = True
        return super().__enter__()

    def __call__(self, func: Callable[P, Any]) -> Callable[P, Any]:
        """The function, each call of it inside the block."""
        self._used = True
        return super().__call__(func)

    def __del__(self) -> None:
        if not self._used:
            warnings.warn(
                f"glora.{self._name} acts inside a `with` block alone; it was called without one, and nothing was "
                f"changed. Write `with glora.{self._name}(...):` and indent what is to run so.",
                UserWarning,
                stacklevel=2,
            )


def block(function: Callable[P, Generator[T]]) -> Callable[P, Block[T]]:
    """`contextlib.contextmanager`, for what people call (Note [Forgotten with])."""

    @wraps(function)
    def make(*args: P.args, **kwds: P.kwargs) -> Block[T]:
        return Block(function, args, kwds)

    return make
