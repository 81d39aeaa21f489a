"""The authors' own code: the tensors that it saves of a trained supernet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from glora.config import GLoRAConfig
from glora.interop.tensors import read_tensors
from glora.model.attach import attach_spec
from glora.model.walk import Model, owners
from glora.spec import AdapterFileError, AdapterSpec, LayerSpec, join
from glora.text import format_names

# Note [The authors' supernet]
# Each layer has factors for the largest form of every path: Ad (out, r), Au (r, in), Bd, Bu, Cd (in, r), Cu (r, 1), D
# (out,), E (out,). A smaller form uses a part of them: a lower rank the first columns of Xd and rows of Xu, a vector
# the first column of Xd, a constant its first entry; D and E likewise. The file does not say which forms were chosen.
# The search does: a dict such as {"A": "LoRA_4", "B": "vector", ...} for each layer, in the model's order.

_DIMENSIONS = {"Ad": 2, "Au": 2, "Bd": 2, "Bu": 2, "Cd": 2, "Cu": 2, "D": 1, "E": 1}


def load_official(
    model: Model,
    file: str | os.PathLike[str],
    forms: GLoRAConfig | Mapping[str, GLoRAConfig] | Sequence[Mapping[str, str]],
    name: str = "default",
    *,
    trainable: bool = True,
) -> Model:
    """Attach what the authors' code saved (`<dataset>.pt`), in the forms that were chosen for its layers.

    Args:
        model: the model, its layers under the names in the file (timm's, for the authors' files).
        file: the file of trained tensors, read as tensors alone.
        forms: one config for all layers; a config for each layer, by its path; or the authors' own, a dict such as
            `{"A": "LoRA_4", "B": "vector", "C": "none", "D": "constant", "E": "none"}` for each layer in order.
        name: the adapter's name in the model.
        trainable: whether its tensors ask for gradients.

    Returns:
        The model; the adapter is the only active one. Tensors of a head (`head.weight`) become the adapter's head.

    Raises:
        glora.AdapterFileError: a damaged file, tensors that are not a supernet's, or that do not fit the model.
        ValueError: forms for other layers than the file has, or of a higher rank.
        FileNotFoundError: no file.

    Source: https://github.com/Arnav0400/ViT-Slim, folder GLoRA (`layer.py`, `utils.py`).
    """
    file = Path(file)
    adapter = read_official(file, forms, [owner.path for owner in owners(model)])
    return attach_spec(model, adapter, file, name=name, trainable=trainable)


def read_official(
    file: Path, forms: GLoRAConfig | Mapping[str, GLoRAConfig] | Sequence[Mapping[str, str]], order: Sequence[str]
) -> AdapterSpec:
    """The adapter in a file of the authors' code; `order` has the model's paths."""
    by_path: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, tuple[str, ...]] = {}
    tensors: dict[str, Tensor] = {}
    for key, tensor in read_tensors(file)[0].items():
        path, _, last = key.rpartition(".")
        if last in _DIMENSIONS:
            by_path.setdefault(path, {})[last] = tensor
        else:
            heads[path] = (*heads.get(path, ()), last)
            tensors[key] = tensor
    broken = [path for path, parts in by_path.items() if {n: t.ndim for n, t in parts.items()} != _DIMENSIONS]
    if broken or not by_path:
        raise AdapterFileError(
            f"Each layer of the authors' files has {', '.join(_DIMENSIONS)}, D and E vectors and the rest "
            f"matrices; those of {file} that have not: {format_names(broken) or 'all'}."
        )
    layers: dict[str, LayerSpec] = {}
    positions = {path: number for number, path in enumerate(order)}
    paths = sorted(by_path, key=lambda path: (positions.get(path, len(order)), path))
    for path, config in _configs(forms, paths).items():
        config = replace(config, balance="none")  # theirs has none
        parts = by_path[path]
        layers[path] = layer = LayerSpec(config, parts["Ad"].shape[0], parts["Au"].shape[1])
        rank = parts["Ad"].shape[1]
        if (layer.rank or 0) > rank:
            raise ValueError(
                f"A config may have the rank of the file at most, {rank} at {path!r}; found rank {layer.rank}."
            )
        if config.product != "hadamard" or config.scaling != 1:
            raise ValueError(f"The authors' A is elementwise and has no alpha; found {config!r} for {path!r}.")
        tensors |= {join(path, key): tensor for key, tensor in _cut(config, parts).items()}
    return AdapterSpec(layers, heads, tensors)


def _cut(config: GLoRAConfig, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a layer's tensors that its forms use (Note [The authors' supernet])."""
    tensors: dict[str, Tensor] = {}
    for name, form in config.forms.items():
        if form == "lora":
            tensors[f"{name}.left"] = parts[f"{name}d"][:, : config.rank]
            tensors[f"{name}.right"] = parts[f"{name}u"][: config.rank]
        elif form != "none":
            vector = parts[name] if name in "DE" else parts[f"{name}d"][:, :1]
            tensors[f"{name}.value"] = vector if form == "vector" else vector.reshape(-1)[:1]
    return tensors


def _configs(
    forms: GLoRAConfig | Mapping[str, GLoRAConfig] | Sequence[Mapping[str, str]], paths: Sequence[str]
) -> dict[str, GLoRAConfig]:
    """Path to config, from any of the three ways to say it."""
    if isinstance(forms, GLoRAConfig):
        return dict.fromkeys(paths, forms)
    if isinstance(forms, Mapping):
        if set(forms) != set(paths):
            raise ValueError(
                f"forms must name each layer of the file, {format_names(paths)}; found {format_names(forms)}."
            )
        return dict(forms)
    if len(forms) != len(paths):
        raise ValueError(
            f"forms must have one entry a layer, in the model's order; found {len(forms)} for {len(paths)}."
        )
    return {path: _authors_config(choice) for path, choice in zip(paths, forms, strict=True)}


def _authors_config(choice: Mapping[str, str]) -> GLoRAConfig:
    """One layer's forms, as the authors' search writes them."""
    ranks = {form.removeprefix("LoRA_") for form in choice.values() if form.startswith("LoRA_")}
    rank = ranks.pop() if ranks else "8"
    if set(choice) != set("ABCDE") or ranks or not rank.isdecimal():
        raise ValueError(f"A layer's forms must be A to E, with one rank; found {dict(choice)!r}.")
    config: dict[str, Any] = {path: "lora" if form.startswith("LoRA_") else form for path, form in choice.items()}
    return GLoRAConfig(**config, rank=int(rank))
