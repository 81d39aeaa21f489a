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
from glora.files.container import replace_files
from glora.interop.tensors import read_tensors, tensor_file
from glora.model.attach import attach_spec
from glora.model.state import describe
from glora.model.walk import Model, owners
from glora.precision import working_dtype
from glora.spec import AdapterFileError, AdapterSpec, LayerSpec, join
from glora.text import format_names, format_problems

# Note [LyCORIS's layouts]
# W' = W0 + (W0 A + B) alpha / r, or alpha / sqrt(r) where it was trained with rs_lora, which the file does not say. An
# alpha of 0 means r. Since version 3 of LyCORIS A = a1 a2 and B = b1 b2, with a1 (in, r), a2 (r, in), b1 (out, r) and
# b2 (r, in); before, A = a2 a1 and B = b2 b1, with the shapes exchanged. The shapes of the model's layers tell the two
# apart, unless in = out = r; then the layout counts as today's.
#
# A layer's name is a prefix ("lycoris", "lora_unet", ...) and its path with underscores for dots. Paths have
# underscores too, so that a name can only be matched with the paths of the model.

# glora's keys within a layer, and LyCORIS's.
_KEYS = {"A.left": "a1.weight", "A.right": "a2.weight", "B.left": "b1.weight", "B.right": "b2.weight"}
_FORMS: dict[str, Any] = {"A": "lora", "B": "lora", "C": "none", "D": "none", "E": "none", "product": "matmul"}


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

    Both layouts of its tensors are read, that since version 3 and that before. LyCORIS is not needed.

    Args:
        model: the model; the names in the file must be one prefix and its layers' paths with underscores for dots.
        file: `.safetensors`, or what `torch.save` wrote (read as tensors alone).
        name: the adapter's name in the model.
        trainable: whether its tensors ask for gradients.
        rs_lora: whether it was trained with LyCORIS's `rs_lora`, scaled by `alpha / sqrt(rank)` instead of
            `alpha / rank`. The file does not say, and LyCORIS itself reads every file as without.
        strict: for files that glora wrote: whether another base is an error, or a warning; see `glora.load`.

    Returns:
        The model; the adapter is the only active one.

    Raises:
        glora.AdapterFileError: a damaged file, another algorithm, a layer that is not linear or not in the model.
        FileNotFoundError: no file.

    Source: LyCORIS 4.1, `lycoris/modules/glora.py`.
    """
    file = Path(file)
    layers = [owner for owner in owners(model) if isinstance(owner.module, nn.Linear)]
    shapes = {layer.path: tuple(layer.tensors["weight"].shape) for layer in layers}
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
        ValueError: what LyCORIS's format cannot hold, by name: A or B that is not low rank (none is written as zeros),
            an elementwise A, any C, D or E, a head. Nothing is written then.
        KeyError: no adapter of that name.

    Source: LyCORIS 4.1, `lycoris/modules/glora.py`.
    """
    write_lycoris(Path(file), describe(model, name), rs_lora=rs_lora)


def read_lycoris(file: Path, shapes: Mapping[str, tuple[int, ...]], *, rs_lora: bool = False) -> AdapterSpec:
    """The adapter in a file of LyCORIS, for a model with layers at these paths, with weights of these shapes."""
    read, base = read_tensors(file)
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read.items():
        name, _, part = key.partition(".")
        by_name.setdefault(name, {})[part] = tensor
    path_of = _resolve(list(by_name), list(shapes), file)
    layers: dict[str, LayerSpec] = {}
    tensors: dict[str, Tensor] = {}
    for name, parts in by_name.items():
        matrices = [parts[part] for part in _KEYS.values() if part in parts and parts[part].ndim == 2]
        if len(matrices) < 4 or parts.keys() != {*_KEYS.values(), "alpha"}:
            raise AdapterFileError(
                f"A linear layer of LyCORIS's GLoRA has {', '.join(_KEYS.values())} (matrices) and alpha; {name!r} in "
                f"{file} has {', '.join(f'{part} {tuple(t.shape)}' for part, t in parts.items())}."
            )
        path = path_of[name]
        if not _fit(matrices, shapes[path]):
            a2, a1, b2, b1 = matrices
            matrices = [a1, a2, b1, b2]
        if not _fit(matrices, shapes[path]):
            raise AdapterFileError(
                f"The tensors of {name!r} in {file} are of neither layout of LyCORIS's GLoRA for {path!r} of shape "
                f"{shapes[path]}."
            )
        rank = matrices[0].shape[1]
        try:
            alpha = (float(parts["alpha"]) or rank) * (math.sqrt(rank) if rs_lora else 1)
            config = GLoRAConfig(**_FORMS, rank=rank, alpha=alpha)
        except (ValueError, RuntimeError) as error:
            raise AdapterFileError(f"{name!r} in {file}: {error}") from error
        layers[path] = LayerSpec(config, shapes[path][0], shapes[path][1])
        tensors |= {join(path, key): tensor for key, tensor in zip(_KEYS, matrices, strict=True)}
    return AdapterSpec(layers, {}, tensors, base=base)


def write_lycoris(file: Path, adapter: AdapterSpec, *, rs_lora: bool = False) -> None:
    """Write an adapter as LyCORIS's GLoRA.

    Raises:
        ValueError: LyCORIS's GLoRA cannot hold it; nothing is written.
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
        factors = {key: adapter.tensors[join(path, key)] for key in _KEYS if join(path, key) in adapter.tensors}
        dtype = working_dtype(next(iter(factors.values()), torch.empty(0)))
        for key, spec in replace(layer, config=replace(config, **_FORMS)).tensors().items():
            zeros = torch.zeros(cast("tuple[int, ...]", spec.shape), dtype=dtype)  # for a path that is none
            tensors[f"{name}.{_KEYS[key]}"] = factors.get(key, zeros)
        factor = math.sqrt(config.rank) if rs_lora else config.rank
        tensors[f"{name}.alpha"] = torch.tensor(config.scaling * factor, dtype=dtype)
    if problems:
        raise ValueError(
            f"LyCORIS's GLoRA has A and B low rank, of a matrix product, and nothing else; this adapter cannot be "
            f"written for it, and nothing was. Found: {format_problems(problems)}. Keep it with glora.save."
        )
    replace_files({file: tensor_file(tensors, adapter.base)})


def _fit(matrices: list[Tensor], shape: tuple[int, ...]) -> bool:
    """Whether a1, a2, b1 and b2 are of today's layout for a weight of this shape."""
    rank = matrices[0].shape[1]
    o, i = shape if len(shape) == 2 else (-1, -1)
    return [tuple(t.shape) for t in matrices] == [(i, rank), (rank, i), (o, rank), (rank, i)]


def _resolve(names: list[str], paths: list[str], file: Path) -> dict[str, str]:
    """The file's names to the model's paths, under one prefix that all names have."""
    paths_of: dict[str, list[str]] = {}
    for path in paths:
        paths_of.setdefault(path.replace(".", "_"), []).append(path)
    first = names[0] if names else ""
    prefixes = {first.removesuffix(flat) for flat in paths_of if flat and first.endswith(f"_{flat}")}
    for prefix in sorted(prefixes, key=lambda prefix: (prefix != "lycoris_", prefix)):
        flat_of = {name: name.removeprefix(prefix) for name in names}
        if all(name.startswith(prefix) and flat in paths_of for name, flat in flat_of.items()):
            ambiguous = [path for flat in flat_of.values() for path in paths_of[flat] if len(paths_of[flat]) > 1]
            if ambiguous:
                raise AdapterFileError(f"{file} names layers by one name for several: {format_names(ambiguous)}.")
            return {name: paths_of[flat][0] for name, flat in flat_of.items()}
    raise AdapterFileError(
        f"The names in {file} must be a prefix and the model's paths with underscores for dots; found "
        f"{format_names(names)}, and the model has {format_names(paths)}."
    )
