"""State dicts: an adapter's tensors alone, and the base model's as if there were no adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from glora.layer.parametrization import Bias, own_tensors, stashed, stores_of
from glora.model.adapters import adapter_tensors, resolve_name
from glora.model.checks import refuse_while_swapped
from glora.model.sharded import reshard, write_into
from glora.model.walk import Model, wraps
from glora.spec import join, like, mismatches
from glora.text import format_problems


def state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The tensors of one adapter, heads included, and nothing of the base model.

    Args:
        model: the model, or a wrapper of it (its prefix is dropped from the keys).
        name: the adapter; None for the only one.

    Returns:
        Key to detached tensor, which shares the adapter's memory. Keys are `<module path>.<path>.<factor>`: `left`
        `(out, r)` and `right` `(r, in)` for lora (C: `(in, r)` and `(r, 1)`), `value` for vector and constant; for
        heads `<module path>.<tensor>`, persistent buffers included.

    Raises:
        KeyError: no adapter of that name.
        ValueError: None, and not exactly one adapter.
        RuntimeError: tensors that FullyShardedDataParallel has flattened.

    Example:
        >>> import torch, glora
        >>> list(glora.state_dict(glora.apply(torch.nn.Linear(4, 2), config=glora.GLoRAConfig(A="vector"))))
        ['A.value', 'B.left', 'B.right', 'C.value', 'D.value', 'E.value']
    """
    reshard(model)
    return {key: tensor.detach() for key, tensor in adapter_tensors(model, resolve_name(model, name)).items()}


def load_state_dict(
    model: Model, state_dict: Mapping[str, Tensor], name: str | None = None, strict: bool = True
) -> Model:
    """Write a `glora.state_dict` into an adapter that is attached.

    Args:
        model: the model.
        state_dict: key to tensor; floating dtypes are cast to the adapter's. Into a model under `fully_shard` every
            rank writes the same whole tensors, together.
        name: the adapter; None for the only one.
        strict: whether every key must be there, and no other; if False, the keys that both have are written.

    Returns:
        The model.

    Raises:
        KeyError: no adapter of that name.
        ValueError: a missing or unexpected key, a wrong shape, a tensor that is not floating where it should be. All
            are named, and nothing was written.
        RuntimeError: inside `glora.merged` or `glora.route`.

    Example:
        >>> import torch, glora
        >>> layer = glora.apply(torch.nn.Linear(4, 2))
        >>> glora.load_state_dict(layer, glora.state_dict(layer)) is layer
        True
    """
    refuse_while_swapped(model)
    reshard(model)
    name = resolve_name(model, name)
    own = adapter_tensors(model, name)
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError(
            f"An adapter must have memory to be written into; {name!r} is on the meta device. "
            f"Call model.to_empty(device=...) first, load, and glora.reset_parameters what is not loaded."
        )
    wanted = {key: like(tensor) for key, tensor in own.items()}
    problems = list(mismatches(state_dict, wanted, strict=strict))
    if problems:
        raise ValueError(
            f"A state dict must fit the adapter that it is loaded into, {name!r}; nothing was written. "
            f"Found {format_problems(problems, most=len(problems))}. Attach with the config that it was saved under, "
            f"or pass strict=False to write only the keys that both have."
        )
    with torch.inference_mode(False), torch.no_grad():
        for key, tensor in own.items():
            if key in state_dict:
                write_into(tensor, state_dict[key])
    return model


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base model's tensors under their ordinary keys, as if no adapter were attached.

    Heads give the base model's tensors; a bias that `create_bias=True` made is not there. A layer that torch's own
    removal has baked an adapter into gives what it holds now.

    Args:
        model: the model, or a wrapper of it (its prefix is dropped from the keys).

    Returns:
        Key to detached tensor, which shares the model's memory.

    Example:
        >>> import torch, glora
        >>> list(glora.base_state_dict(glora.apply(torch.nn.Linear(4, 2))))
        ['weight', 'bias']
    """
    base: dict[str, Tensor] = {}
    model = cast("nn.Module", model._modules.get("_original_module", model))  # Fabric's wrapper has its keys
    for key, value in cast("dict[str, Tensor]", model.state_dict()).items():
        owner, path, rest = _owner(model, key)
        stores = stores_of(owner)
        parts = rest.split(".")
        if parts[0] == "parametrizations" and len(parts) > 1 and parts[1] in stores:
            created = isinstance(stores[parts[1]], Bias) and cast("Bias", stores[parts[1]]).created
            if parts[2:] == ["original"] and not created:
                base[join(path, parts[1])] = value
        elif owner in stashed and rest in stores:
            if not isinstance(stores[rest], Bias) or not cast("Bias", stores[rest]).created:
                base[join(path, rest)] = own_tensors(owner)[rest].detach()
        elif not isinstance(owner, AveragedModel):  # whose own count of averages is no tensor of the model
            base[join(path, rest)] = value
    return base


def _owner(model: nn.Module, key: str) -> tuple[nn.Module, str, str]:
    """The module that a key of `model.state_dict()` belongs to, its path without wrappers, and the rest of the key."""
    owner, path, parts = model, "", key.split(".")
    while len(parts) > 1 and parts[0] != "parametrizations" and isinstance(owner._modules.get(parts[0]), nn.Module):
        path = path if wraps(owner, parts[0]) else join(path, parts[0])
        owner = cast("nn.Module", owner._modules[parts.pop(0)])
    return owner, path, ".".join(parts)
