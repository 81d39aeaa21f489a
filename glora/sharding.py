"""Tensors of which each rank holds a part (DTensors): read whole, and written from whole ones."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor, of which each rank holds a part."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every rank (Note [All ranks together])."""
    return cast("Any", tensor).full_tensor() if is_sharded(tensor) else tensor


def divided_like(tensor: Tensor, value: Tensor, *, from_first: bool = False) -> Tensor:
    """A whole tensor divided over the ranks as `tensor` is, or itself where that is whole.

    Args:
        tensor: what to divide it like; may be on the meta device.
        value: of the same shape.
        from_first: the first rank's value is taken, which sends it. Else each rank has the same whole value and takes
            its part without asking.
    """
    if not is_sharded(tensor) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    own: Any = tensor
    source = 0 if from_first else None
    value = value.detach().to(own.device_mesh.device_type, own.dtype)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=source)


def replicated_like(tensor: Tensor, value: Tensor) -> Tensor:
    """A tensor that stands whole on every rank that holds a part of `tensor`, or itself where that is whole."""
    if not is_sharded(tensor):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = cast("Any", tensor).device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
