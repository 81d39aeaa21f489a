"""Giving back what was changed for a while, whatever ends the block."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager


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
