"""Tensors that fully_shard has spread over ranks: read whole, written from whole ones, saved once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn

from glora.model.modules import adapted_matrices, adapted_modules

# Note [All ranks together]
# Gathering a tensor is a collective: every rank takes part, in the same order. So every rank calls `glora.save`; one
# tensor at a time is whole, and no rank leaves before the file is there, or all raise.


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each rank holds a part."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every rank."""
    return cast("Any", tensor).full_tensor() if is_sharded(tensor) else tensor


def write_into(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    value = whole(value)
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        own: Any = tensor
        # src_data_rank=None: every rank has the whole, and takes its part without asking the others.
        value = distribute_tensor(value.to(own.device, own.dtype), own.device_mesh, own.placements, src_data_rank=None)
    tensor.copy_(value)


def save_together(tensors: Mapping[str, Tensor], write: Callable[[dict[str, Tensor]], None]) -> None:
    """`write(tensors)` with whole tensors; if sharded, by the first rank (Note [All ranks together])."""
    if not any(map(is_sharded, tensors.values())):
        write(dict(tensors))
        return
    first = dist.get_rank() == 0
    gathered: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        value = whole(tensor)
        if first:
            gathered[key] = value.cpu()
    failure: list[BaseException | None] = [None]
    if first:
        try:
            write(gathered)
        except Exception as error:
            failure[0] = error
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


def refuse_flat(model: nn.Module) -> None:
    """Raise RuntimeError where FullyShardedDataParallel has flattened the tensors of adapted layers."""
    for named in adapted_modules(model):
        weights = [named.tensors.get(at.matrix.weight) for at in adapted_matrices(named)]
        if any(weight is not None and weight.ndim == 1 for weight in weights) and _has_flat(model):
            raise RuntimeError(
                f"FullyShardedDataParallel has flattened the tensors of {named.path!r}, and each rank has a part. Do "
                f"this inside `with FullyShardedDataParallel.summon_full_params(model):`, on rank 0 if it writes a "
                f"file, or shard with fully_shard."
            )


def _has_flat(model: nn.Module) -> bool:
    return any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules())
