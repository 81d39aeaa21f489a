"""Giving back what was changed for a while, whatever ends the block."""

from __future__ import annotations

import gc
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
