"""The dtype that updates are computed in, and the way around autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Note [Rounded once]
# A half-precision W0 takes updates smaller than its own spacing only if they are added up before the one rounding back.
# So every update is computed and summed in `working_dtype` (float32 at least), and `functional.add` alone rounds.
# Autocast would undo this, since it turns each matrix product to half precision; whoever multiplies therefore steps out
# of it. Elementwise operations need no such care: autocast leaves them alone.


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What adapted modules may be held in; the rest (8 bits) says nothing of its scales."""


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which updates from these tensors are computed: the widest of theirs, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def is_half(dtype: torch.dtype) -> bool:
    """Whether it is one of the two dtypes of half precision."""
    return dtype in (torch.bfloat16, torch.float16)


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in this dtype: itself where it has it, which `Tensor.to` takes two microseconds to find."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in its `working_dtype`: itself, but for half precision."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.to(working_dtype(tensor))


def in_autocast(tensor: Tensor) -> bool:
    """Whether autocast of the tensor's device is on."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def outside_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast of the tensor's device is off; none where it is off already, which costs less."""
    return torch.autocast(tensor.device.type, enabled=False) if in_autocast(tensor) else nullcontext()


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` in `working_dtype`, also under autocast (Note [Rounded once])."""
    dtype = working_dtype(left, right)
    with outside_autocast(left):
        return as_dtype(left, dtype) @ as_dtype(right, dtype)
