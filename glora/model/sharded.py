"""Tensors that fully_shard has divided over ranks: written from whole ones, and saved once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn

from glora.model.walk import adapted_owners, adapted_sites
from glora.tensors import gathered, is_sharded, sharded_like

# Note [Tensor parallel]
# parallelize_module makes a layer's weights and inputs DTensors, each as its style divides it; adapters are attached
# then. Their factors are DTensors that stand whole on every rank (they are thin), and W' is computed of DTensors, by
# the dense kernel: torch knows which rank needs what, forward and backward, for every form and style. The other order
# fails in torch, which registers what `named_parameters` lists, and takes no name with a dot.

# Note [All ranks together]
# Gathering a tensor is a collective: every rank takes part, in the same order. So every rank calls `glora.save`; one
# tensor at a time is whole, and no rank leaves before the file is there, or all raise.


def write_into(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    tensor.copy_(sharded_like(tensor, gathered(value)))


def save_together(tensors: Mapping[str, Tensor], write: Callable[[dict[str, Tensor]], None]) -> None:
    """`write(tensors)` with whole tensors; if sharded, by the first rank (Note [All ranks together])."""
    if not any(map(is_sharded, tensors.values())):
        write(dict(tensors))
        return
    first = dist.get_rank() == 0
    kept: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        value = gathered(tensor)
        if first:
            kept[key] = value.cpu()
    failure: list[BaseException | None] = [None]
    if first:
        try:
            write(kept)
        except Exception as error:
            failure[0] = error
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


def reshard(model: nn.Module) -> None:
    """Let each rank hold its parts alone: after a forward pass without a backward one, a root still has wholes.

    Raises:
        RuntimeError: FullyShardedDataParallel has flattened the tensors of adapted layers.
    """
    _refuse_flat(model)
    for module in model.modules():
        if is_fully_sharded(module):
            cast("Any", module).reshard()


def _refuse_flat(model: nn.Module) -> None:
    """Raise RuntimeError where FullyShardedDataParallel has flattened the tensors of adapted layers."""
    for named in adapted_owners(model):
        weights = [named.tensors.get(at.matrix.weight) for at in adapted_sites(named)]
        if any(weight is not None and weight.ndim == 1 for weight in weights) and _has_flat(model):
            raise RuntimeError(
                f"FullyShardedDataParallel has flattened the tensors of {named.path!r}, and each rank has a part. Do "
                f"this inside `with FullyShardedDataParallel.summon_full_params(model):`, on rank 0 if it writes a "
                f"file, or shard with fully_shard."
            )


def _has_flat(model: nn.Module) -> bool:
    return any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules())


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether fully_shard was called on this module."""
    return hasattr(type(module), "_get_fsdp_state")


def is_tensor_parallel(module: nn.Module, tensor: Tensor) -> bool:
    """Whether parallelize_module alone has divided this tensor of a module; fully_shard on top needs a second mesh."""
    applied = "_distribute_module_applied" in vars(module)
    return applied and is_sharded(tensor) and cast("Any", tensor).device_mesh.ndim == 1
