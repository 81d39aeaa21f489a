"""fully_shard: adapters whose tensors are divided over ranks, saved once, changed and taken off part by part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glora.layer.keys import before_plain_keys
from glora.model.change import Engine, engines
from glora.model.walk import Owner, adapted_owners, adapted_sites
from glora.tensors import gathered, is_quantised, is_sharded, is_tensor_parallel, sharded_like
from glora.torch_internals import is_traceable_wrapper_subclass

# Note [All ranks together]
# Gathering a tensor is a collective: every rank takes part, in the same order. So every rank calls `glora.save`; one
# tensor at a time is gathered, and no rank leaves before the file is there, or all raise.


def save_together(tensors: Mapping[str, Tensor], write: Callable[[dict[str, Tensor]], None]) -> None:
    """`write(tensors)` with gathered tensors; if sharded, by the first rank (Note [All ranks together])."""
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
    """After a forward without a backward the root still holds full parameters: reshard.

    Raises:
        RuntimeError: FullyShardedDataParallel has flattened the tensors of adapted layers.
    """
    modules = list(model.modules()) if dist.is_available() and dist.is_initialized() else []
    if any(hasattr(module, "_fsdp_wrapped_module") for module in modules):
        _refuse_flat(model)
    for module in modules:
        if is_fully_sharded(module):
            cast("Any", module).reshard()


def _refuse_flat(model: nn.Module) -> None:
    """Raise RuntimeError where FullyShardedDataParallel has flattened the tensors of adapted layers."""
    for owner in adapted_owners(model):
        weights = [owner.tensors.get(site.matrix.weight) for site in adapted_sites(owner)]
        if any(weight is not None and weight.ndim == 1 for weight in weights):
            raise RuntimeError(
                f"FullyShardedDataParallel has flattened the tensors of {owner.place!r}, and each rank has a part. Do "
                f"this inside `with FullyShardedDataParallel.summon_full_params(model):`, on rank 0 if it writes a "
                f"file, or shard with fully_shard."
            )


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether fully_shard was called on this module."""
    return hasattr(type(module), "_get_fsdp_state")


# Note [Taken off part by part]
# W' is computed on DTensors as on any tensor: each rank computes its rows, from the factors that it gathers. But
# fully_shard remembers, for each parameter that it gathers and frees, the module and the name that it stands under.
# When adapters come off, W0's place is another, and factors have none: `update_locations` tells it, by attributes that
# torch keeps to itself. All of them are read before anything changes.
def refuse_sharded(model: nn.Module, walk: list[Owner], for_good: bool) -> None:
    """Raise RuntimeError where sharded tensors cannot become those of plain layers, for good or for a while."""
    sharded = [(owner, name) for owner in walk for name in owner.stores if _is_divided(owner.tensors[name])]
    if sharded:
        managed = {id(_parameter(record)) for group in groups(model) for record in group.fsdp_params}
        for owner, name in sharded:
            original = owner.tensors[name]
            if for_good and (id(original) in managed or is_tensor_parallel(owner.module, original)):
                continue
            rule = (
                "fully_shard must have divided what is to be merged or freed of its adapters, and the call be on the "
                "whole model that it was called on"
                if for_good
                else "Inside glora.merged layers have whole, plain tensors (glora.merge merges sharded ones, for good)"
            )
            raise RuntimeError(
                f"{rule}; `{name}` of {owner.place!r} is sharded (a {type(original).__name__}). Or save "
                f"the adapter from all ranks, glora.save(model, directory), and merge offline: the command `glora "
                f"merge base directory out`, or glora.load and glora.merge in a model that is not sharded."
            )


def _is_divided(tensor: Tensor) -> bool:
    """Whether something that holds its numbers elsewhere stands in a tensor's place: a DTensor, as a rule."""
    return is_traceable_wrapper_subclass(tensor) and not is_quantised(tensor)


def update_locations(model: nn.Module) -> None:
    """Tell fully_shard where its parameters stand now, after adapters came off and flags came back."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module, name))
    for group in groups(model):
        known = [(record._module_info.module, record._module_info.param_name) for record in group.fsdp_params]
        stood = [places.get(id(_parameter(record)), []) for record in group.fsdp_params]
        if all(place in where for place, where in zip(known, stood, strict=True)):
            continue  # nothing came off: torch's hooks stay, a backward pass may be pending
        kept: list[Any] = []
        for record, where in zip(group.fsdp_params, stood, strict=True):
            if where:
                location = record._module_info
                (location.module, location.param_name), *others = where
                location.shared_modules = [module for module, _ in others]
                location.shared_param_names = [name for _, name in others]
                kept.append(record)
        group.fsdp_params = kept
        hooks = group._module_to_pre_save_state_dict_hook_handle, group._module_to_pre_load_state_dict_hook_handle
        if any(hooks):
            for handles in hooks:
                for handle in handles.values():
                    handle.remove()
                handles.clear()
            group._register_state_dict_hooks()
            # Gradients are reduced in the dtype of what trained; now the base may, in half precision.
            if len({record.sharded_param.dtype for record in kept if record.sharded_param.requires_grad}) == 1:
                group._init_mp_dtypes()


def _parameter(record: Any) -> object:
    """The parameter itself: its record follows an exchanged one (`load_state_dict(assign=True)`) at the next call."""
    location = record._module_info
    return location.module._parameters.get(location.param_name)


def groups(model: nn.Module) -> list[Any]:
    """fully_shard's records, one for the parameters that are gathered together."""
    by_id: dict[int, Any] = {}
    for module in model.modules():
        if is_fully_sharded(module):
            state = cast("Any", module)._get_fsdp_state()
            several: list[Any] | None = getattr(state, "_fsdp_param_groups", None)  # older torch has one
            by_id |= {id(group): group for group in (several or [state._fsdp_param_group]) if group is not None}
    return list(by_id.values())


# Note [Plain keys of a sharded model]
# torch's `set_model_state_dict` shards what it is given by the model's own keys, and does not know the plain keys of an
# adapted module. Whole tensors may arrive on all ranks, or (`broadcast_from_rank0`) on rank 0 only; it broadcasts them.
def broadcast_plain(state_dict: dict[str, Any], originals: dict[str, Tensor]) -> None:
    """Shard the whole tensors of rank 0 over all ranks; originals: by their plain keys."""
    meshes = [cast("Any", tensor).device_mesh for tensor in originals.values() if is_sharded(tensor)]
    if not meshes:
        return
    given = {key: state_dict[key] for key in originals if key in state_dict and not is_sharded(state_dict[key])}
    from_first: list[dict[str, Tensor | None]] = [
        {key: None if is_sharded(originals[key]) else value for key, value in given.items()}
    ]
    for group in meshes[0].get_all_groups():
        dist.broadcast_object_list(from_first, src=dist.get_global_rank(group, 0), group=group)
    for key, value in from_first[0].items():
        original = originals[key]
        empty = torch.empty(original.shape, dtype=original.dtype, device="cpu") if value is None else value
        state_dict[key] = sharded_like(original, given.get(key, empty), from_first=True)


engines.append(Engine(reshard, refuse_sharded, update_locations))
before_plain_keys.append(broadcast_plain)
