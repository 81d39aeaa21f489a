"""Each private name of torch that the library uses, once: an upgrade of torch that takes one away fails here, by name.

A module's `_modules`, `_parameters` and `_buffers` are used where they are needed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = ["not_compiled", "not_persistent", "storage_of", "tree_flatten", "tree_leaves", "tree_map", "tree_unflatten"]

not_compiled: Any = _disable_dynamo
"""Decorates a function that torch.compile calls and does not trace. torch.compiler.disable imports the compiler."""


def not_persistent(module: nn.Module) -> set[str]:
    """The names of a module's own buffers that its state dict leaves out."""
    return module._non_persistent_buffers_set


def storage_of(tensor: Tensor) -> int:
    """Identity of the memory that a tensor is in."""
    return tensor.untyped_storage()._cdata
