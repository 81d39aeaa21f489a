"""Each private name of torch that the library uses, once: an upgrade of torch that takes one away fails here, by name.

A module's `_modules`, `_parameters` and `_buffers` are used where they are needed; what fully_shard keeps to itself, in
`engines/fsdp`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.jit._trace import is_tracing
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = [
    "CAN_WIDEN",
    "in_backward",
    "in_transform",
    "is_exporting",
    "is_mapped",
    "is_traceable_wrapper_subclass",
    "is_traced",
    "is_tracing",
    "memory_of",
    "not_compiled",
    "not_persistent",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
]

_C: Any = torch._C  # pyright: ignore - torch leaves it untyped

not_compiled: Any = _disable_dynamo
"""Decorates a function that torch.compile calls and does not trace. torch.compiler.disable imports the compiler."""

_in_func_transform: Any = _C._are_functorch_transforms_active

is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # not in the oldest torch


CAN_WIDEN: bool = "dtype" in torch.ops.aten.mm.overloads()
"""Whether `torch.mm` takes an `out_dtype`, which CUDA alone has a kernel for; not in the oldest torch."""


def in_transform() -> bool:
    """Whether one of torch.func's transforms or forward-mode differentiation is active."""
    return _in_func_transform() or forward_ad._current_level >= 0  # pyright: ignore


def is_traced() -> bool:
    """Whether torch.compile traces this, or one of torch.func's transforms is active."""
    return torch.compiler.is_compiling() or _in_func_transform()


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread."""
    return _C._current_graph_task_id() != -1


def is_mapped(tensor: Tensor) -> bool:
    """Whether `torch.autograd.grad(..., is_grads_batched=True)` maps over the tensor."""
    return _C._functorch.is_legacy_batchedtensor(tensor)


def not_persistent(module: nn.Module) -> set[str]:
    """The names of a module's own buffers that its state dict leaves out."""
    return module._non_persistent_buffers_set


def memory_of(tensor: Tensor) -> int:
    """Identity of the memory that a tensor is in."""
    return tensor.untyped_storage()._cdata
