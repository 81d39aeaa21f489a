"""An adapter's tensors and description apart from the model, and the base model's as if there were no adapter."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from glora.config import FORMS, GLoRAConfig
from glora.fingerprint import Fingerprint, end_of, fingerprint
from glora.layer.heads import Head, HeadCopy, SharedCopy
from glora.layer.parametrization import Bias, Paths, Weight, other_description, own_tensors, stores_of
from glora.model.adapters import adapter_tensors, resolve_name
from glora.model.change import change, walk_to_read
from glora.model.statistics import kept_statistics
from glora.model.walk import Model, Owner, Site, adapted_sites, wraps
from glora.spec import AdapterSpec, LayerSpec, join, like, mismatches
from glora.tensors import gathered, is_quantised, write_into
from glora.text import brief, format_names, format_problems


def state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The tensors of one adapter, heads included, and nothing of the base model.

    Args:
        model: the model, or a wrapper of it (its prefix is dropped from the keys).
        name: the adapter; None for the only one.

    Returns:
        Key to detached tensor, which shares the adapter's memory, with alpha and product in the attribute `_metadata`
        (Note [Descriptions of state dicts]). Keys are `<module path>.<path>.<factor>`: `left`
        `(out, r)` and `right` `(r, in)` for lora (C: `(in, r)` and `(r, 1)`), `value` for vector and constant; for
        heads `<module path>.<tensor>`, persistent buffers included.

    Raises:
        KeyError: no adapter of that name.
        ValueError: no `name`, and not exactly one adapter.
        RuntimeError: tensors that FullyShardedDataParallel has flattened.

    Example:
        >>> import torch, glora
        >>> list(glora.state_dict(glora.apply(torch.nn.Linear(4, 2), config=glora.GLoRAConfig(A="vector"))))
        ['A.value', 'B.left', 'B.right']
    """
    walk = walk_to_read(model)
    name = resolve_name(walk, name)
    tensors = OrderedDict((key, tensor.detach()) for key, tensor in adapter_tensors(walk, name).items())
    vars(tensors)["_metadata"] = {_DESCRIPTION: _description(walk, name)}
    return tensors


_DESCRIPTION = "glora.description"


def _description(walk: Iterable[Owner], name: str) -> dict[str, dict[str, float | str]]:
    """Path of a layer to its description (Note [Descriptions of state dicts])."""
    description: dict[str, dict[str, float | str]] = {}
    for owner in walk:
        for store in owner.stores.values():
            part = store.parts().get(name)
            if isinstance(part, Paths):
                description.setdefault(cast("Weight | Bias", store).matrix.path(owner.path), {}).update(
                    part.description()
                )
    return description


def _other_descriptions(given: Mapping[str, object], walk: Iterable[Owner], name: str) -> Iterator[str]:
    metadata = cast("Mapping[str, Any]", getattr(given, "_metadata", None) or {})
    described = metadata.get(_DESCRIPTION, {})
    for path, own in _description(walk, name).items():
        for found in other_description(described.get(path, {}), own):
            yield f"{path or 'the model itself'}: {found}"


def load_state_dict(
    model: Model, state_dict: Mapping[str, Tensor], name: str | None = None, strict: bool = True
) -> Model:
    """Write a `glora.state_dict` into an adapter that is attached.

    Args:
        model: the model.
        state_dict: key to tensor; floating dtypes are cast to the adapter's. Into a model under `fully_shard` every
            rank writes the same whole tensors, together.
        name: the adapter; None for the only one.
        strict: whether every key must be there (those of running statistics may be missing), and no other; if False,
            the keys that both have are written.

    Returns:
        The model.

    Raises:
        KeyError: no adapter of that name.
        ValueError: a missing or unexpected key, or with `strict=False` none that both have; a wrong shape, a tensor
            that is not floating where it should be; a state dict that says that it was trained under another alpha or
            product (Note [Descriptions of state dicts]). All are named, and nothing was written.
        RuntimeError: inside `glora.merged` or `glora.route`.

    Example:
        >>> import torch, glora
        >>> layer = glora.apply(torch.nn.Linear(4, 2))
        >>> glora.load_state_dict(layer, glora.state_dict(layer)) is layer
        True
    """
    if not isinstance(state_dict, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"state_dict must go from key to tensor, as glora.state_dict gives it; found {brief(state_dict)}. "
            f"glora.load reads files."
        )
    with change(model, reversible=False) as walk, torch.no_grad():
        name = resolve_name(walk, name)
        tensors = adapter_tensors(walk, name)
        if any(tensor.is_meta for tensor in tensors.values()):
            raise ValueError(
                f"An adapter must have memory to be written into; {name!r} is on the meta device. "
                f"Call model.to_empty(device=...) first, load, and glora.reset_parameters what is not loaded."
            )
        optional = {join(owner.path, each) for owner, names in kept_statistics(walk, name) for each in names}
        wanted = {key: like(t) for key, t in tensors.items() if key in state_dict or key not in optional}
        problems = list(mismatches(state_dict, wanted, strict=strict))
        problems += _other_descriptions(state_dict, walk, name)
        common = tensors.keys() & state_dict.keys()
        if not common and not strict and tensors:
            problems.append(f"none of its keys, but {format_names(state_dict)}")
        if problems:
            remedy = "Attach with the config that it was saved under"
            if not common:
                remedy = "glora.state_dict gives the keys of an adapter; model.load_state_dict takes those of the model"
            elif strict:
                remedy += ", or pass strict=False to write only the keys that both have"
            raise ValueError(
                f"A state dict must fit the adapter that it is loaded into, {name!r}; nothing was written. "
                f"Found {format_problems(problems, most=len(problems))}. {remedy}."
            )
        for key, tensor in tensors.items():
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
        >>> sorted(glora.base_state_dict(glora.apply(torch.nn.Linear(4, 2))))
        ['bias', 'weight']
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
        elif rest in stores:  # inside glora.merged: a live adapter's tensor has no plain key
            if not isinstance(stores[rest], Bias) or not cast("Bias", stores[rest]).created:
                base[join(path, rest)] = own_tensors(owner)[rest].detach()
        elif not isinstance(owner, AveragedModel):  # skip its `n_averaged`
            base[join(path, rest)] = value
    return base


def _owner(model: nn.Module, key: str) -> tuple[nn.Module, str, str]:
    """The module that a key of `model.state_dict()` belongs to, its path without wrappers, and the rest of the key."""
    owner, path, parts = model, "", key.split(".")
    while len(parts) > 1 and parts[0] != "parametrizations" and isinstance(owner._modules.get(parts[0]), nn.Module):
        path = path if wraps(owner, parts[0]) else join(path, parts[0])
        owner = cast("nn.Module", owner._modules[parts.pop(0)])
    return owner, path, ".".join(parts)


def describe(model: nn.Module, name: str | None = None) -> AdapterSpec:
    """An adapter of a model; its tensors share the model's memory.

    Raises:
        KeyError: no adapter of that name.
        ValueError: no `name`, and not exactly one adapter.
        RuntimeError: torch's removal has taken the adapters off a part of a head, or has baked in the weight of a layer
            whose bias had a C, of which only the vector W0 C is left.
    """
    walk = walk_to_read(model)
    name = resolve_name(walk, name)
    layers: dict[str, LayerSpec] = {}
    heads: dict[str, tuple[str, ...]] = {}
    statistics = {owner.path: names for owner, names in kept_statistics(walk, name)}
    base: dict[str, Fingerprint] = {}
    key_of_copy: dict[int, str] = {}
    described: dict[tuple[int, tuple[str, ...], bool], GLoRAConfig] = {}  # many layers share one
    source_of_key: dict[str, int] = {}
    for owner in walk:
        parts = {tensor: store.parts()[name] for tensor, store in owner.stores.items() if name in store.parts()}
        if not parts:
            continue
        for site in adapted_sites(owner):
            both = [parts.get(tensor) for tensor in (site.matrix.weight, site.matrix.bias or "")]
            configs = {path: part.config for part in both if isinstance(part, Paths) for path in part.paths()}
            if configs:
                layers[site.path] = _describe_layer(site, configs, described)
                base |= _fingerprints(site)
        copies = tuple(tensor for tensor, part in parts.items() if isinstance(part, HeadCopy))
        shared = {tensor: part.source for tensor, part in parts.items() if isinstance(part, SharedCopy)}
        key_of_copy |= {id(parts[tensor]): join(owner.path, tensor) for tensor in copies}
        source_of_key |= {join(owner.path, tensor): id(source) for tensor, source in shared.items()}
        if owner.path in statistics:
            continue
        if copies and {*copies, *shared} != set(owner.tensors):
            raise RuntimeError(
                f"torch's removal has taken the adapters off a part of the head {owner.place!r}, which a file holds "
                f"as a whole. Remove them from all of its tensors, or merge before saving."
            )
        if copies:
            heads[owner.path] = copies
    for key, source in source_of_key.items():
        if source not in key_of_copy:
            raise RuntimeError(
                f"torch's removal has taken the adapters off the head that {key!r} is tied to. Remove both, or merge "
                f"before saving."
            )
    ties = {key: key_of_copy[source] for key, source in source_of_key.items()}
    tensors = {key: tensor.detach() for key, tensor in adapter_tensors(walk, name).items()}
    for path, layer in layers.items():
        layers[path] = _without_padding(path, layer, tensors)
    return AdapterSpec(layers, heads, tensors, ties, base, _outside(walk, name, base), statistics)


def _without_padding(path: str, layer: LayerSpec, tensors: dict[str, Tensor]) -> LayerSpec:
    """The layer at the rank that it is described with, and its tensors cut to it (Note [Hot swap])."""
    names = [join(path, name) for name, form in layer.config.forms.items() if form == "lora"]
    rank, pairs = layer.config.rank, [(tensors[f"{name}.left"], tensors[f"{name}.right"]) for name in names]
    if all(left.shape[-1] == rank for left, _ in pairs):
        return layer
    for left, right in pairs:
        padding = left[..., rank:], right[..., rank:, :]
        if not left.is_meta and all(gathered(part).any() for part in padding):
            held = left.shape[-1]
            return replace(layer, config=replace(layer.config, rank=held, alpha=layer.config.scaling * held))
    for name, (left, right) in zip(names, pairs, strict=True):
        tensors[f"{name}.left"], tensors[f"{name}.right"] = left[..., :rank], right[..., :rank, :]
    return layer


def padded(tensors: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors in the shapes of those that they are written into (Note [Hot swap])."""
    given = dict(tensors)
    for key, tensor in held.items():
        if key in given and given[key].shape != tensor.shape and key.endswith((".left", ".right")):
            value, axis = given[key], -1 if key.endswith("left") else -2
            missing = list(value.shape)
            missing[axis] = max(tensor.shape[axis] - value.shape[axis], 0)
            given[key] = torch.cat([value, value.new_zeros(missing)], axis)
    return given


def _describe_layer(
    site: Site, configs: Mapping[str, GLoRAConfig], described: dict[tuple[int, tuple[str, ...], bool], GLoRAConfig]
) -> LayerSpec:
    """A matrix with these paths of an adapter; `described` holds the configs that were made for others."""
    bias = site.bias
    if bias is not None and "C" in configs and bias.has_frozen_prompt():
        raise RuntimeError(
            f"torch's removal has baked the weight of {site.path!r} in, and only W0 C is left of its path C, which no "
            f"file holds. Remove the bias's adapters too, or merge before saving."
        )
    config = next(iter(configs.values()))
    created = bias is not None and bias.created and any(path in configs for path in "CE")
    key = id(config), tuple(configs), created
    if key not in described:
        forms = {path: getattr(config, path) if path in configs else "none" for path in FORMS}
        described[key] = replace(config, **forms, create_bias=created)
    config = described[key]
    *batch, out_features, in_features = site.weight.shape
    return LayerSpec(config, out_features, in_features, site.has_own_bias, site.matrix, tuple(batch))


def _outside(walk: list[Owner], name: str, base: Mapping[str, Fingerprint]) -> dict[str, Fingerprint]:
    """Key to fingerprint of the end of each tensor that the adapter neither changes nor holds."""
    known: dict[str, Fingerprint] = {}
    seen: set[int] = set()
    for owner in walk:
        for tensor_name, tensor in owner.tensors.items():
            key, store = join(owner.path, tensor_name), owner.stores.get(tensor_name)
            held = isinstance(store, Head) and name in store.parts()
            created = isinstance(store, Bias) and store.created
            if key in base or held or created or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            numbers = None if is_quantised(tensor) else fingerprint(end_of(tensor))
            known |= {} if numbers is None else {key: numbers}
    return known


def _fingerprints(site: Site) -> dict[str, Fingerprint]:
    """Key to fingerprint of an adapted matrix's frozen tensors: its weight, and its bias if it has one of its own."""
    names = [site.matrix.weight, *([site.matrix.bias] if site.matrix.bias is not None and site.has_own_bias else [])]
    known = {join(site.owner.path, name): fingerprint(site.owner.tensors[name]) for name in names}
    return {key: numbers for key, numbers in known.items() if numbers is not None}
