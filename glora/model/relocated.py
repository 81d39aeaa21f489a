"""Adapters off a model that fully_shard has divided, which must be told where its parameters stand then."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from glora.model.sharded import is_fully_sharded, is_tensor_parallel
from glora.model.walk import Owner
from glora.tensors import is_quantised


# Note [Taken off part by part]
# W' is computed on DTensors as on any tensor: each rank computes its rows, from the factors that it gathers. What is
# new is that fully_shard remembers, for each parameter that it gathers and frees, the module and the name that it
# stands under. When adapters come off, W0's place is another, and factors have none: `update_fsdp_locations`
# tells it, by attributes that torch keeps to itself. All of them are read before anything changes.
def refuse_divided(model: nn.Module, modules: Iterable[Owner], *, for_good: bool) -> None:
    """Raise RuntimeError where divided tensors cannot become those of plain layers, for good or for a while."""
    managed = {id(_parameter(record)) for group in groups(model) for record in group.fsdp_params}
    for named in modules:
        for name in named.stores:
            original = named.tensors[name]
            if not is_traceable_wrapper_subclass(original) or is_quantised(original):
                continue
            if for_good and (id(original) in managed or is_tensor_parallel(named.module, original)):
                continue
            rule = (
                "fully_shard must have divided what is to be merged or freed of its adapters, and the call be on the "
                "whole model that it was called on"
                if for_good
                else "Inside glora.merged layers have whole, plain tensors (glora.merge merges sharded ones, for good)"
            )
            raise RuntimeError(
                f"{rule}; `{name}` of {named.path!r} is sharded (a {type(original).__name__}). Or save "
                f"the adapter from all ranks, glora.save(model, directory), and merge offline: the command `glora "
                f"merge base directory out`, or glora.load and glora.merge in a model that is not sharded."
            )


def update_fsdp_locations(model: nn.Module) -> None:
    """Tell fully_shard where its parameters stand now, after adapters came off and flags came back."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module, name))
    for group in groups(model):
        kept: list[Any] = []
        for record in group.fsdp_params:
            found = places.get(id(_parameter(record)))
            if found:
                at = record._module_info
                (at.module, at.param_name), *others = found
                at.shared_modules = [module for module, _ in others]
                at.shared_param_names = [name for _, name in others]
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
    at = record._module_info
    return at.module._parameters.get(at.param_name)


def groups(model: nn.Module) -> list[Any]:
    """fully_shard's records, one for the parameters that are gathered together."""
    found: dict[int, Any] = {}
    for module in model.modules():
        if is_fully_sharded(module):
            state = cast("Any", module)._get_fsdp_state()
            several: list[Any] | None = getattr(state, "_fsdp_param_groups", None)  # older torch has one
            found |= {id(group): group for group in (several or [state._fsdp_param_group]) if group is not None}
    return list(found.values())
