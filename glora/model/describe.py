"""An adapter of a model, described apart from it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from glora.config import FORMS, GLoRAConfig
from glora.fingerprint import Fingerprint
from glora.layer.heads import HeadCopy, SharedCopy
from glora.layer.parametrization import Paths
from glora.model.adapters import adapter_tensors, resolve_name
from glora.model.base import fingerprints
from glora.model.sharded import reshard
from glora.model.walk import Site, adapted_owners, adapted_sites
from glora.spec import AdapterSpec, LayerSpec, join


def describe(model: nn.Module, name: str | None = None) -> AdapterSpec:
    """An adapter of a model; its tensors share the model's memory.

    Raises:
        KeyError: no adapter of that name.
        ValueError: None, and not exactly one adapter.
        RuntimeError: a layer whose weight torch's removal has baked in while its bias still had a C, of which only the
            vector W0 C is left.
    """
    reshard(model)
    name = resolve_name(model, name)
    layers: dict[str, LayerSpec] = {}
    heads: dict[str, tuple[str, ...]] = {}
    base: dict[str, Fingerprint] = {}
    owners: dict[int, str] = {}
    borrowed: dict[str, int] = {}
    for named in adapted_owners(model):
        parts = {tensor: store.parts()[name] for tensor, store in named.stores.items() if name in store.parts()}
        for at in adapted_sites(named):
            own = [parts.get(tensor) for tensor in (at.matrix.weight, at.matrix.bias or "")]
            paths = {path: part.config for part in own if isinstance(part, Paths) for path in part.paths()}
            if paths:
                layers[at.path] = _describe_layer(at, paths)
                base |= fingerprints(at)
        copies = tuple(tensor for tensor, part in parts.items() if isinstance(part, HeadCopy))
        shared = {tensor: part.source for tensor, part in parts.items() if isinstance(part, SharedCopy)}
        owners |= {id(parts[tensor]): join(named.path, tensor) for tensor in copies}
        borrowed |= {join(named.path, tensor): id(source) for tensor, source in shared.items()}
        if copies and {*copies, *shared} != set(named.tensors):
            raise RuntimeError(
                f"torch's removal has taken the adapters off a part of the head {named.path!r}, which a file holds "
                f"as a whole. Remove them from all of its tensors, or merge before saving."
            )
        if copies:
            heads[named.path] = copies
    astray = [key for key, source in borrowed.items() if source not in owners]
    if astray:
        raise RuntimeError(
            f"torch's removal has taken the adapters off the head that {astray[0]!r} is tied to. Remove both, "
            f"or merge before saving."
        )
    ties = {key: owners[source] for key, source in borrowed.items()}
    tensors = {key: tensor.detach() for key, tensor in adapter_tensors(model, name).items()}
    return AdapterSpec(layers, heads, tensors, ties, base)


def _describe_layer(at: Site, paths: dict[str, GLoRAConfig]) -> LayerSpec:
    """A matrix with these paths of an adapter."""
    if at.bias is not None and "C" in paths and at.bias.has_frozen_prompt():
        raise RuntimeError(
            f"torch's removal has baked the weight of {at.path!r} in, and only W0 C is left of its path C, which no "
            f"file holds. Remove the bias's adapters too, or merge before saving."
        )
    config = next(iter(paths.values()))
    forms = {path: config.forms[path] if path in paths else "none" for path in FORMS}
    created = at.bias is not None and at.bias.created and any(path in paths for path in "CE")
    config = replace(config, **forms, create_bias=created)  # pyright: ignore
    *batch, out_features, in_features = at.weight.shape
    return LayerSpec(config, out_features, in_features, at.has_own_bias, at.matrix, tuple(batch))
