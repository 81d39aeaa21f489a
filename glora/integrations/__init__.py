"""Checkpoints of a framework that hold the adapter instead of the model: `trainer`, `lightning`; references: `trl`.

Each is imported when it is first asked for.

Example:
    >>> import glora
    >>> glora.integrations.trainer.AdapterCheckpoints.__name__
    'AdapterCheckpoints'
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glora.integrations import lightning, trainer, trl

__all__ = ["lightning", "trainer", "trl"]


def __getattr__(name: str) -> Any:
    """`lightning`, `trainer` and `trl`, imported when they are first asked for."""
    if name in __all__:
        return importlib.import_module(f"glora.integrations.{name}")
    raise AttributeError(f"module 'glora.integrations' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The module's names, with those that are not imported yet."""
    return sorted({*globals(), *__all__})
