"""LyCORIS: its GLoRA (matrix product, low rank) both ways."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glora.config import GLoRAConfig
from glora.files.container import import_optional, replace_file
from glora.functional import working_dtype
from glora.interop.tensors import read_tensors
from glora.model.attach import attach_spec
from glora.model.describe import describe
from glora.model.modules import Model, named_modules
from glora.spec import AdapterFileError, AdapterSpec, LayerSpec
from glora.text import format_names

# Note [LyCORIS's layouts]
# W' = W0 + (W0 A + B) alpha / r. Since its version 3 the tensors are A = a1 a2 and B = b1 b2, with a1 (in, r), a2
# (r, in), b1 (out, r), b2 (r, in); before, A = a2 a1 and B = b2 b1, with the shapes exchanged. The shapes tell which,
# beside those of the model's layers, unless in and r are one number and out too; then it is taken as today's.
#
# A layer's name is a prefix ("lycoris", "lora_unet", ...) and its path with underscores for dots. Underscores are in
# paths too, so that only the model's own paths can say which layer is meant.

_TENSORS = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")


def load_lycoris(model: Model, file: str | os.PathLike[str], name: str = "default", *, trainable: bool = True) -> Model:
    """Attach a GLoRA that LyCORIS saved: A and B low rank, `product="matmul"`, with its alpha.

    Both layouts of its tensors are read, that of version 3 and later and the one before. LyCORIS is not needed.

    Args:
        model: the model; its layers' paths with underscores for dots, after one prefix, are the file's names.
        file: `.safetensors`, or what `torch.save` wrote (read as tensors alone).
        name: the adapter's name in the model.
        trainable: whether its tensors ask for gradients.

    Returns:
        The model; the adapter is the only active one.

    Raises:
        glora.AdapterFileError: a damaged file, another algorithm, a layer that is not linear or not in the model.
        FileNotFoundError: no file.

    Source: LyCORIS 4.1, `lycoris/modules/glora.py`.
    """
    file = Path(file)
    layers = [f for f in named_modules(model) if isinstance(f.module, nn.Linear)]
    shapes = {f.path: tuple(f.tensors["weight"].shape) for f in layers}
    return attach_spec(model, read_lycoris(file, shapes), file, name=name, trainable=trainable)


def save_lycoris(model: nn.Module, file: str | os.PathLike[str], name: str | None = None) -> None:
    """Write one adapter as LyCORIS saves its GLoRA, with the prefix `lycoris`.

    Args:
        model: the model.
        file: the `.safetensors` file to write.
        name: the adapter; None for the only one.

    Raises:
        ValueError: what LyCORIS cannot say, named: A or B that is not low rank (none is written as zeros), an
            elementwise A, any C, D or E, a head. Nothing is written then.
        KeyError: no adapter of that name.
    """
    write_lycoris(Path(file), describe(model, name))


def read_lycoris(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> AdapterSpec:
    """The adapter in a file of LyCORIS, for a model with layers at these paths, with weights of these shapes."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(file).items():
        layer, _, part = key.partition(".")
        by_name.setdefault(layer, {})[part] = tensor
    resolved = _resolve(list(by_name), list(shapes), file)
    layers: dict[str, LayerSpec] = {}
    tensors: dict[str, Tensor] = {}
    for layer, given in by_name.items():
        if set(given) != {*_TENSORS, "alpha"} or any(given[part].ndim != 2 for part in _TENSORS):
            raise AdapterFileError(
                f"A linear layer of LyCORIS's GLoRA has {', '.join(_TENSORS)} (matrices) and alpha; {layer!r} in "
                f"{file} has {', '.join(f'{part} {tuple(t.shape)}' for part, t in given.items())}."
            )
        a1, a2, b1, b2 = (given[part] for part in _TENSORS)
        path = resolved[layer]
        if not _fit(a1, a2, b1, b2, shapes[path]):
            a1, a2, b1, b2 = a2, a1, b2, b1
        if not _fit(a1, a2, b1, b2, shapes[path]):
            raise AdapterFileError(
                f"The tensors of {layer!r} in {file} are of neither layout of LyCORIS's GLoRA for {path!r} of shape "
                f"{shapes[path]}."
            )
        rank = a1.shape[1]
        alpha = float(given["alpha"]) or rank  # 0 means the rank, there
        try:
            config = GLoRAConfig(**_forms("lora", "lora"), rank=rank, alpha=alpha, product="matmul")
        except ValueError as error:
            raise AdapterFileError(f"{layer!r} in {file}: {error}") from error
        layers[path] = LayerSpec(config, b1.shape[0], b2.shape[1])
        found = {"A.left": a1, "A.right": a2, "B.left": b1, "B.right": b2}
        tensors |= {f"{path}.{key}" if path else key: tensor for key, tensor in found.items()}
    return AdapterSpec(layers, {}, tensors)


def write_lycoris(file: Path, adapter: AdapterSpec) -> None:
    """Write a described adapter as LyCORIS's GLoRA."""
    safetensors = import_optional("safetensors.torch")
    problems = [f"{path!r} is a head" for path in adapter.heads]
    tensors: dict[str, Tensor] = {}
    for path, layer in adapter.layers.items():
        config = layer.config
        problems += [f"{path!r} has {n}={config.forms[n]}" for n in "AB" if config.forms[n] not in ("lora", "none")]
        problems += [f"{path!r} has {n}={config.forms[n]}" for n in "CDE" if config.forms[n] != "none"]
        if config.A == "lora" and config.product != "matmul":
            problems.append(f"{path!r} has product={config.product!r}")
    if problems:
        raise ValueError(
            f"LyCORIS's GLoRA has A and B low rank, of a matrix product, and nothing else; this adapter cannot be "
            f"written for it, and nothing was. Found: {format_names(problems)}. Keep it with glora.save."
        )
    for path, layer in adapter.layers.items():
        name, rank = f"lycoris_{path}".replace(".", "_"), layer.config.rank
        if f"{name}.alpha" in tensors:
            raise ValueError(f"Two layers have one name in LyCORIS's files, {name!r}; nothing was written.")
        given = {key: adapter.tensors.get(f"{path}.{key}" if path else key) for key in _FACTORS}
        known = next(tensor for tensor in given.values() if tensor is not None)
        in_features, out_features = layer.in_features, layer.out_features
        if in_features is None or out_features is None:
            raise ValueError(f"The shape of {path!r} is not known, and LyCORIS's files need it.")
        empty = {
            "A.left": (in_features, rank),
            "A.right": (rank, in_features),
            "B.left": (out_features, rank),
            "B.right": (rank, in_features),
        }
        for (key, tensor), part in zip(given.items(), _TENSORS, strict=True):
            tensors[f"{name}.{part}"] = known.new_zeros(empty[key]) if tensor is None else tensor
        tensors[f"{name}.alpha"] = torch.tensor(layer.config.scaling * rank, dtype=working_dtype(known))
    data = safetensors.save({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, {"format": "pt"})
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda opened: opened.write(data))


_FACTORS = ("A.left", "A.right", "B.left", "B.right")


def _forms(A: str, B: str) -> dict[str, Any]:
    return {"A": A, "B": B, "C": "none", "D": "none", "E": "none"}


def _fit(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, shape: tuple[int, ...]) -> bool:
    rank = a1.shape[1]
    o, i = shape if len(shape) == 2 else (-1, -1)
    return [t.shape for t in (a1, a2, b1, b2)] == [(i, rank), (rank, i), (o, rank), (rank, i)]


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
