"""Each private name of torch that the library uses, once: an upgrade of torch that takes one away fails here, by name.

A module's `_modules`, `_parameters` and `_buffers` are used where they are needed; what fully_shard keeps to itself, in
`engines/fsdp`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.jit._trace import is_tracing
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = [
    "CheckpointedRegion",
    "checkpointed_regions",
    "has_half_units",
    "in_backward",
    "in_transform",
    "is_mapped",
    "is_traceable_wrapper_subclass",
    "is_traced",
    "is_tracing",
    "is_view",
    "is_watched",
    "memory_of",
    "not_compiled",
    "not_persistent",
    "running_backward",
    "saved_tensors_hooks",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "writes_to",
]

_C: Any = torch._C  # pyright: ignore - torch leaves it untyped

not_compiled: Any = _disable_dynamo
"""Decorates a function that torch.compile calls and does not trace. torch.compiler.disable imports the compiler."""

_in_func_transform: Any = _C._are_functorch_transforms_active


def in_transform() -> bool:
    """Whether one of torch.func's transforms or forward-mode differentiation is active."""
    return _in_func_transform() or forward_ad._current_level >= 0  # pyright: ignore


def is_traced() -> bool:
    """Whether torch.compile traces this, or one of torch.func's transforms is active."""
    return torch.compiler.is_compiling() or _in_func_transform()


running_backward: Callable[[], int] = _C._current_graph_task_id
"""A number of the backward pass that autograd runs in this thread; -1 for none."""


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread."""
    return running_backward() != -1


saved_tensors_hooks: Callable[[bool], tuple[Any, Any] | None] = _C._autograd._top_saved_tensors_default_hooks
"""Given False: the innermost pair of hooks for saved tensors; None for none."""


_watchers: list[Callable[[], bool]] = [_in_func_transform, _C._is_tracing, _C._is_any_autocast_enabled]
if torch.backends.mps.is_built():  # torch's "any" leaves it out
    _watchers.append(partial(torch.is_autocast_enabled, "mps"))


def is_watched() -> bool:
    """Whether anything looks at the operations that run here, or changes them: a tracer, autocast, a checkpoint."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:  # pyright: ignore
        return True
    for watches in _watchers:  # functions of C, each of which is called by itself: this is asked in every forward
        if watches():
            return True
    return saved_tensors_hooks(False) is not None or running_backward() != -1


class CheckpointedRegion(NamedTuple):
    """A region of torch.utils.checkpoint.

    Attributes:
        record: torch's own, which lives as long as the region's graph.
        is_second_run: whether it runs for the backward pass.
        is_reentrant: whether it calls backward inside of backward; its first run is then without gradients.
    """

    record: object
    is_second_run: bool
    is_reentrant: bool


def checkpointed_regions() -> list[CheckpointedRegion]:
    """The checkpointed regions that run in this thread, the innermost first."""
    regions: list[CheckpointedRegion] = []
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            kind, names = frame.f_code.co_name, frame.f_locals
            if kind == "checkpoint" and "gen" in names:
                regions.append(CheckpointedRegion(names["gen"].gi_frame.f_locals["new_frame"], False, False))
            elif kind == "unpack_hook":
                regions.append(CheckpointedRegion(names["frame"], True, False))
            elif kind in ("forward", "backward") and "ctx" in names:
                regions.append(CheckpointedRegion(names["ctx"], kind == "backward", True))
        frame = frame.f_back
    return regions


def is_mapped(tensor: Tensor) -> bool:
    """Whether `torch.autograd.grad(..., is_grads_batched=True)` maps over the tensor."""
    return _C._functorch.is_legacy_batchedtensor(tensor)


CPU_UNITS: dict[torch.dtype, bool] = {
    torch.bfloat16: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}


def has_half_units(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the tensor's device multiplies matrices of half precision; a processor that cannot is given loops."""
    return not tensor.is_cpu or CPU_UNITS[dtype]


def not_persistent(module: nn.Module) -> set[str]:
    """The names of a module's own buffers that its state dict leaves out."""
    return module._non_persistent_buffers_set


def writes_to(tensor: Tensor) -> int:
    """How often the tensor was written to in place."""
    return tensor._version


def is_view(tensor: Tensor) -> bool:
    """Whether the tensor is a view of another."""
    return tensor._is_view()


def memory_of(tensor: Tensor) -> int:
    """Identity of the memory that a tensor is in."""
    return tensor.untyped_storage()._cdata
