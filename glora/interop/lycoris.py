"""LyCORIS: its GLoRA (matrix product, low rank) both ways."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from glora.config import GLoRAConfig
from glora.files.base import base_metadata, read_base
from glora.files.container import plain_tensors, replace_files, serialize
from glora.interop.tensors import read_tensors
from glora.model.attach import attach_spec
from glora.model.state import describe
from glora.model.walk import Model, owners
from glora.precision import working_dtype
from glora.spec import AdapterFileError, AdapterSpec, LayerSpec, join
from glora.text import format_names, format_problems

# Note [LyCORIS's layouts]
# W' = W0 + (W0 A + B) alpha / r, or alpha / sqrt(r) where it was trained with rs_lora, which the file does not say. An
# alpha of 0 means r. Since its version 3 the tensors are A = a1 a2 and B = b1 b2, with a1 (in, r), a2
# (r, in), b1 (out, r), b2 (r, in); before, A = a2 a1 and B = b2 b1, with the shapes exchanged. The shapes tell which,
# beside those of the model's layers, unless in and r are one number and out too; then it is taken as today's.
#
# A layer's name is a prefix ("lycoris", "lora_unet", ...) and its path with underscores for dots. Underscores are in
# paths too, so that only the model's own paths can say which layer is meant.

# Our keys within a layer, and LyCORIS's.
_KEYS = {"A.left": "a1.weight", "A.right": "a2.weight", "B.left": "b1.weight", "B.right": "b2.weight"}


def load_lycoris(
    model: Model,
    file: str | os.PathLike[str],
    name: str = "default",
    *,
    trainable: bool = True,
    rs_lora: bool = False,
    strict: bool = False,
) -> Model:
    """Attach a GLoRA that LyCORIS saved: A and B low rank, `product="matmul"`, with its alpha.

    Both layouts of its tensors are read, that of version 3 and later and the one before. LyCORIS is not needed.

    Args:
        model: the model; its layers' paths with underscores for dots, after one prefix, are the file's names.
        file: `.safetensors`, or what `torch.save` wrote (read as tensors alone).
        name: the adapter's name in the model.
        trainable: whether its tensors ask for gradients.
        rs_lora: whether it was trained with LyCORIS's `rs_lora`, a scale of `alpha / sqrt(rank)` for `alpha / rank`.
            The file does not say, and LyCORIS itself reads every file as without.
        strict: for files that glora wrote: whether another base is an error, or a warning; see `glora.load`.

    Returns:
        The model; the adapter is the only active one.

    Raises:
        glora.AdapterFileError: a damaged file, another algorithm, a layer that is not linear or not in the model.
        FileNotFoundError: no file.

    Source: LyCORIS 4.1, `lycoris/modules/glora.py`.
    """
    file = Path(file)
    layers = [f for f in owners(model) if isinstance(f.module, nn.Linear)]
    shapes = {f.path: tuple(f.tensors["weight"].shape) for f in layers}
    adapter = read_lycoris(file, shapes, rs_lora=rs_lora)
    return attach_spec(model, adapter, file, name=name, trainable=trainable, strict=strict)


def save_lycoris(
    model: nn.Module, file: str | os.PathLike[str], name: str | None = None, *, rs_lora: bool = False
) -> None:
    """Write one adapter as LyCORIS saves its GLoRA, with the prefix `lycoris`.

    Args:
        model: the model.
        file: the `.safetensors` file to write.
        name: the adapter; None for the only one.
        rs_lora: write the alpha for a network that is made with `rs_lora`; the file does not say which it is.

    Raises:
        ValueError: what LyCORIS cannot say, named: A or B that is not low rank (none is written as zeros), an
            elementwise A, any C, D or E, a head. Nothing is written then.
        KeyError: no adapter of that name.

    Source: LyCORIS 4.1, `lycoris/modules/glora.py`.
    """
    write_lycoris(Path(file), describe(model, name), rs_lora=rs_lora)


def read_lycoris(file: Path, shapes: Mapping[str, tuple[int, ...]], *, rs_lora: bool = False) -> AdapterSpec:
    """The adapter in a file of LyCORIS, for a model with layers at these paths, with weights of these shapes."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(file).items():
        layer, _, part = key.partition(".")
        by_name.setdefault(layer, {})[part] = tensor
    resolved = _resolve(list(by_name), list(shapes), file)
    layers: dict[str, LayerSpec] = {}
    tensors: dict[str, Tensor] = {}
    for layer, given in by_name.items():
        matrices = [given[part] for part in _KEYS.values() if part in given and given[part].ndim == 2]
        if len(matrices) < 4 or given.keys() != {*_KEYS.values(), "alpha"}:
            raise AdapterFileError(
                f"A linear layer of LyCORIS's GLoRA has {', '.join(_KEYS.values())} (matrices) and alpha; {layer!r} in "
                f"{file} has {', '.join(f'{part} {tuple(t.shape)}' for part, t in given.items())}."
            )
        path = resolved[layer]
        a1, a2, b1, b2 = matrices
        if not _fit(matrices, shapes[path]):
            matrices = [a2, a1, b2, b1]
        if not _fit(matrices, shapes[path]):
            raise AdapterFileError(
                f"The tensors of {layer!r} in {file} are of neither layout of LyCORIS's GLoRA for {path!r} of shape "
                f"{shapes[path]}."
            )
        rank = matrices[0].shape[1]
        try:
            alpha = (float(given["alpha"]) or rank) * (math.sqrt(rank) if rs_lora else 1)
            config = GLoRAConfig(A="lora", B="lora", **_REST, rank=rank, alpha=alpha, product="matmul")
        except (ValueError, RuntimeError) as error:
            raise AdapterFileError(f"{layer!r} in {file}: {error}") from error
        layers[path] = LayerSpec(config, shapes[path][0], shapes[path][1])
        tensors |= {join(path, key): tensor for key, tensor in zip(_KEYS, matrices, strict=True)}
    return AdapterSpec(layers, {}, tensors, base=read_base(file) if file.suffix == ".safetensors" else {})


def write_lycoris(file: Path, adapter: AdapterSpec, *, rs_lora: bool = False) -> None:
    """Write a described adapter as LyCORIS's GLoRA.

    Raises:
        ValueError: LyCORIS's GLoRA cannot say it; nothing is written.
    """
    problems = [f"{path!r} is a head" for path in adapter.heads]
    tensors: dict[str, Tensor] = {}
    for path, layer in adapter.layers.items():
        config = layer.config
        problems += [f"{path!r} has {n}={config.forms[n]}" for n in "AB" if config.forms[n] not in ("lora", "none")]
        problems += [f"{path!r} has {n}={config.forms[n]}" for n in "CDE" if config.forms[n] != "none"]
        problems += [] if layer.is_linear else [f"{path!r} is no linear layer"]
        if config.A == "lora" and config.product != "matmul":
            problems.append(f"{path!r} has product={config.product!r}")
        if not path or layer.out_features is None or layer.in_features is None:
            problems.append(f"{path!r} has a shape that is not known" if path else "it is on the model itself")
            continue
        name = f"lycoris_{path}".replace(".", "_")
        if f"{name}.alpha" in tensors:
            problems.append(f"two layers have the one name {name!r} there")
        own = {key: adapter.tensors[join(path, key)] for key in _KEYS if join(path, key) in adapter.tensors}
        dtype = working_dtype(next(iter(own.values()), torch.empty(0)))
        whole = replace(layer, config=replace(config, A="lora", B="lora", **_REST, product="matmul"))
        for key, spec in whole.tensors().items():  # zeros where there is no path
            empty = torch.zeros(cast("tuple[int, ...]", spec.shape), dtype=dtype)
            tensors[f"{name}.{_KEYS[key]}"] = own.get(key, empty)
        factor = math.sqrt(config.rank) if rs_lora else config.rank
        tensors[f"{name}.alpha"] = torch.tensor(config.scaling * factor, dtype=dtype)
    if problems:
        raise ValueError(
            f"LyCORIS's GLoRA has A and B low rank, of a matrix product, and nothing else; this adapter cannot be "
            f"written for it, and nothing was. Found: {format_problems(problems)}. Keep it with glora.save."
        )
    replace_files({file: serialize(plain_tensors(tensors), base_metadata(adapter.base))})


_REST: dict[str, Any] = {"C": "none", "D": "none", "E": "none"}


def _fit(matrices: list[Tensor], shape: tuple[int, ...]) -> bool:
    """Whether a1, a2, b1 and b2 are of today's layout for a weight of this shape."""
    rank = matrices[0].shape[1]
    o, i = shape if len(shape) == 2 else (-1, -1)
    return [tuple(t.shape) for t in matrices] == [(i, rank), (rank, i), (o, rank), (rank, i)]


def _resolve(names: list[str], paths: list[str], file: Path) -> Mapping[str, str]:
    """The file's names to the model's paths, under the one prefix that all of them have."""
    flat: dict[str, list[str]] = {}
    for path in paths:
        flat.setdefault(path.replace(".", "_"), []).append(path)
    found: list[dict[str, str]] = []
    first = names[0] if names else ""
    prefixes = [first[: len(first) - len(end) - 1] for end in flat if end and first.endswith(f"_{end}")]
    for prefix in sorted(set(prefixes), key=lambda prefix: prefix != "lycoris"):
        ends = {name: name.removeprefix(f"{prefix}_") for name in names}
        if all(name.startswith(f"{prefix}_") and ends[name] in flat for name in names):
            found.append({name: flat[end][0] for name, end in ends.items()})
            twice = [path for end in ends.values() for path in flat[end] if len(flat[end]) > 1]
            if twice:
                raise AdapterFileError(f"{file} names layers by one name for several: {format_names(twice)}.")
    if not found:
        raise AdapterFileError(
            f"The names in {file} must be a prefix and the model's paths with underscores for dots; found "
            f"{format_names(names)}, and the model has {format_names(paths)}."
        )
    return found[0]
