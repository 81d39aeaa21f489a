"""Taking adapters off a model: one, or all."""

from __future__ import annotations

from glora.layer.registration import unregister
from glora.model import freezing
from glora.model.adapters import adapters, resolve_name
from glora.model.checks import refuse_stacked, refuse_while_swapped
from glora.model.exports import unguard_save_pretrained
from glora.model.relocated import refuse_divided, update_fsdp_locations
from glora.model.sharded import reshard
from glora.model.walk import Model, adapted_owners, all_or_nothing, owners


def delete(model: Model, name: str) -> Model:
    """Drop one adapter, its heads included. Dropping the last one is `glora.remove`.

    The others keep their weights; where the dropped one was active, they go on without it.

    Args:
        model: the model, or a part of it.
        name: the adapter.

    Returns:
        The model.

    Raises:
        KeyError: no adapter of that name.
        RuntimeError: inside `glora.merged` or `glora.route`; another parametrization beside or on top of an adapter.

    Example:
        >>> import torch, glora
        >>> layer = glora.apply(glora.apply(torch.nn.Linear(4, 2), name="a"), name="b")
        >>> glora.adapters(glora.delete(layer, "b"))
        {'a': 0.0}
    """
    refuse_while_swapped(model)
    reshard(model)
    name = resolve_name(model, name)
    modules = adapted_owners(model)
    refuse_stacked(modules)
    refuse_divided(model, modules, for_good=True)
    if set(adapters(model)) == {name}:
        return remove(model)
    with all_or_nothing(model):
        for named in modules:
            for tensor_name, store in named.stores.items():
                store.detach(name)
                if not store.parts():
                    unregister(named.module, tensor_name, keep_value=False)
            if named.adapter_names:
                named.keep_scales(named.acting.adapter_weights)
            else:  # no copy trains in the base's place any more
                freezing.thaw_head(named)
        update_fsdp_locations(model)
    return model


def remove(model: Model) -> Model:
    """Take all adapters off: the very W0 and b0 again (never recomputed), the base model's heads, and no created bias.

    Args:
        model: the model, or a part of it.

    Returns:
        The model; `requires_grad` is as before the first `apply`, unless changed by hand since.

    Raises:
        RuntimeError: inside `glora.merged` or `glora.route`, or another parametrization stacked on an adapter.

    Example:
        >>> import torch, glora
        >>> layer = torch.nn.Linear(4, 2)
        >>> glora.remove(glora.apply(layer)) is layer
        True
    """
    refuse_while_swapped(model)
    reshard(model)
    modules = owners(model)
    refuse_stacked(modules)
    refuse_divided(model, modules, for_good=True)
    with all_or_nothing(model):
        for named in modules:
            for name in sorted(named.stores):
                unregister(named.module, name, keep_value=False)
        freezing.restore(modules)
        unguard_save_pretrained(model)
        update_fsdp_locations(model)
    return model
