"""An adapter of a model, described apart from it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from glora.config import FORMS
from glora.layer.heads import HeadCopy
from glora.layer.parametrization import Bias, Paths
from glora.model.adapters import adapter_tensors, resolve_name
from glora.model.modules import adapted_modules
from glora.model.plan import has_own_bias
from glora.model.sharded import refuse_flat
from glora.spec import AdapterSpec, LayerSpec


def describe(model: nn.Module, name: str | None = None) -> AdapterSpec:
    """An adapter of a model; its tensors share the model's memory.

    Raises:
        KeyError: no adapter of that name.
        ValueError: None, and not exactly one adapter.
        RuntimeError: a layer whose weight torch's removal has baked in while its bias still has a C: the weight that C
            multiplies is in no checkpoint.
    """
    refuse_flat(model)
    name = resolve_name(model, name)
    layers: dict[str, LayerSpec] = {}
    heads: dict[str, tuple[str, ...]] = {}
    for named in adapted_modules(model):
        parts = {tensor: store.parts()[name] for tensor, store in named.adapters.items() if name in store.parts()}
        paths = {path: part.config for part in parts.values() if isinstance(part, Paths) for path in part.paths()}
        if paths:
            bias = named.adapters.get("bias")
            if isinstance(bias, Bias) and bias.frozen_weight is not None and "C" in paths:
                raise RuntimeError(
                    f"torch's removal has baked the weight of {named.path!r} in, and its path C goes by the weight "
                    f"before, which no checkpoint holds. Remove the bias's adapters too, or merge before saving."
                )
            config = next(iter(paths.values()))
            forms = {path: config.forms[path] if path in paths else "none" for path in FORMS}
            created = isinstance(bias, Bias) and bias.created and any(path in paths for path in "CE")
            config = replace(config, **forms, create_bias=created)  # pyright: ignore
            out_features, in_features = named.tensors["weight"].shape
            layers[named.path] = LayerSpec(config, out_features, in_features, has_own_bias(named))
        copies = tuple(tensor for tensor, part in parts.items() if isinstance(part, HeadCopy))
        if copies and set(copies) != set(named.tensors):
            raise RuntimeError(
                f"torch's removal has taken the adapters off a part of the head {named.path!r}, which a file holds "
                f"as a whole. Remove them from all of its tensors, or merge before saving."
            )
        if copies:
            heads[named.path] = copies
    tensors = {key: tensor.detach() for key, tensor in adapter_tensors(model, name).items()}
    return AdapterSpec(layers, heads, tensors)
