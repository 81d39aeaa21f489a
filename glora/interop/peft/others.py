"""An adapter as PEFT's HiRA, IA3, GLoRA or DoRA, by its forms."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from glora.interop.base import Base, bias_at, site_at, weight_at
from glora.interop.peft.lora import Update, Written, exact_update, lora_of, target_modules
from glora.interop.peft.methods import FIELDS
from glora.matrices import EMBEDDING, Matrix
from glora.precision import multiply, wide
from glora.spec import AdapterSpec, LayerSpec, join
from glora.text import format_problems


def write_hira(adapter: AdapterSpec, base: Base) -> Written:
    """An adapter as PEFT's HiRA: A low rank, elementwise, and nothing else. Smaller ranks are filled with zeros."""
    tensors: dict[str, Tensor] = {}
    rank = max((layer.config.rank for layer in adapter.layers.values()), default=0)
    for path, layer in adapter.layers.items():
        if layer.config.paths != ("A",) or layer.config.A != "lora" or layer.config.product != "hadamard":
            raise ValueError(f"{path!r} has {layer.forms}, where A=lora, elementwise, is all that can be")
        matrix = _matrix_inside(path, layer, "HiRA")
        left, right = adapter.tensors[join(path, "A.left")], adapter.tensors[join(path, "A.right")]
        left = left if layer.config.scaling == 1 else wide(left) * layer.config.scaling
        if layer.config.rank < rank:
            more = rank - layer.config.rank
            left = torch.cat([left, left.new_zeros(len(left), more)], 1)
            right = torch.cat([right, right.new_zeros(more, right.shape[1])])
        if matrix == EMBEDDING:
            tensors |= {f"{path}.hira_embedding_A": left.mT, f"{path}.hira_embedding_B": right.mT}
            continue
        kernel = len(matrix.axes) - 2
        if kernel:
            site = site_at(base, path)
            if getattr(site.module, "groups", 1) != 1:
                raise ValueError(f"{path!r} is a convolution with groups, which PEFT's HiRA does not take")
            left = left.reshape(*left.shape, *[1] * kernel)
            right = right.reshape(rank, *site.owner.tensors["weight"].shape[1:])
        tensors |= {f"{path}.hira_A": right, f"{path}.hira_B": left}
    config = {
        "peft_type": "HIRA",
        "r": rank,
        "target_modules": target_modules(list(adapter.layers), base),
        "hira_dropout": 0.0,
        "fan_in_fan_out": _all_transposed(adapter),
        "init_weights": True,
    }
    return Written(config, tensors)


def _all_transposed(adapter: AdapterSpec) -> bool:
    return all(layer.matrix is not None and layer.matrix.axes == ("i", "o") for layer in adapter.layers.values())


def _matrix_inside(path: str, layer: LayerSpec, method: str) -> Matrix:
    """How a layer inside of the model holds its `weight`."""
    matrix = layer.matrix or Matrix()
    if not path:
        raise ValueError("it is on the model itself, and PEFT adapts layers inside of a model")
    if matrix.weight != "weight" or layer.batch:
        raise ValueError(f"{path!r} is a parameter of its module, which PEFT's {method} does not reach")
    return matrix


def write_ia3(adapter: AdapterSpec, base: Base) -> Written:
    """An adapter as PEFT's IA3: the output scaled, bias included, or the input."""
    tensors: dict[str, Tensor] = {}
    inputs: list[str] = []
    for path, layer in adapter.layers.items():
        config, matrix = layer.config, _matrix_inside(path, layer, "IA3")
        kernel = len(matrix.axes) - 2
        if matrix == EMBEDDING or kernel == 1:
            raise ValueError(f"{path!r} is a layer of a kind that PEFT's IA3 does not take")
        scale, D = adapter.tensors.get(join(path, "A.value")), adapter.tensors.get(join(path, "D.value"))
        if scale is None or config.A != "vector" or not set(config.paths) <= {"A", "D"}:
            raise ValueError(f"{path!r} has {layer.forms}, where vectors A and D, or an A of inputs, can be")
        if config.product == "matmul" and D is None:
            inputs.append(path)
            scale = _by_channel(path, scale, base, kernel)
        elif config.product == "hadamard" and (layer.bias is False if D is None else torch.equal(D, scale[:, 0])):
            scale = scale.reshape(1, -1, *[1] * kernel) if kernel else scale
        else:
            raise ValueError(f"{path!r} scales its bias otherwise than its weight (D is not A)")
        tensors[f"{path}.ia3_l"] = wide(scale) + 1
    fields = {
        "peft_type": "IA3",
        "target_modules": target_modules(list(adapter.layers), base),
        "feedforward_modules": "|".join(map(re.escape, inputs)) or [],
        "fan_in_fan_out": _all_transposed(adapter),
        "init_ia3_weights": True,
    }
    return Written(fields, tensors)


def _by_channel(path: str, scale: Tensor, base: Base, kernel: int) -> Tensor:
    """A vector over a convolution's inputs as one over its channels."""
    if not kernel:
        return scale
    site = site_at(base, path)
    shape = site.owner.tensors["weight"].shape
    each = scale.reshape(shape[1], -1)
    if getattr(site.module, "groups", 1) != 1 or not bool((each == each[:, :1]).all()):
        raise ValueError(f"{path!r} is a convolution whose kernel is scaled within a channel, or that has groups")
    return each[:, 0].reshape(1, -1, *[1] * kernel)


def write_dora(adapter: AdapterSpec, base: Base) -> Written:
    """An adapter as PEFT's LoRA with DoRA: W' = g (W0 + s B A), one g for each output; the biases beside as b'.

    With g = 1 + A, PEFT's magnitudes are `g norm(W0 + s B A)`, and its lora_B is ours divided by g.
    """
    updates: dict[str, Update] = {}
    tensors: dict[str, Tensor] = {}
    for path, layer in adapter.layers.items():
        config = layer.config
        matrix = _matrix_inside(path, layer, "DoRA")
        by_rows = config.product == "hadamard" and matrix != EMBEDDING
        by_columns = config.product == "matmul" and matrix == EMBEDDING
        if config.A not in ("none", "constant") and not (config.A == "vector" and (by_rows or by_columns)):
            raise ValueError(f"{path!r} has A={config.A}, which is no scale of outputs")
        update = exact_update(path, replace(layer, config=replace(config, A="none")), adapter.tensors, base)
        W0 = weight_at(base, path)
        g = 1 + (wide(adapter.tensors[join(path, "A.value")]).cpu() if config.A != "none" else torch.zeros(1))
        g = g.reshape(1, -1) if matrix == EMBEDDING else g.reshape(-1, 1)
        if not bool((g != 0).all()):
            raise ValueError(f"{path!r} scales an output by zero, which DoRA's magnitudes cannot undo")
        left, right = wide(update.left).cpu(), wide(update.right).cpu()
        left, right = (left, right / g) if matrix == EMBEDDING else (left / g, right)
        moved = W0 + multiply(left, right) * (update.alpha / update.rank)
        norm = moved.square().sum(0 if matrix == EMBEDDING else 1).sqrt()
        magnitude = g.flatten() * norm
        kernel = len(matrix.axes) - 2
        tensors[f"{path}.lora_magnitude_vector"] = magnitude.reshape(1, -1, *[1] * kernel) if kernel else magnitude
        if update.shift is not None:
            bias = bias_at(base, path)
            if bias is None:
                raise ValueError(f"{path!r} has no bias of its own that DoRA could be written beside")
            tensors[f"{path}.base_layer.bias"] = bias + update.shift
        updates[path] = Update(left, right, update.alpha)
    written = lora_of(adapter, base, updates)
    has_bias = any(key.endswith(".base_layer.bias") for key in tensors)
    config = {**written.config, "use_dora": True, "bias": "lora_only" if has_bias else "none"}
    return Written(config, {**written.tensors, **tensors})


def write_glora(adapter: AdapterSpec, base: Base) -> Written:  # noqa: ARG001 - a writer's arguments
    """An adapter as PEFT's GLoRA: A and B of one form, D and E of another, in all layers alike.

    `alpha / rank` is multiplied into the left factors, since PEFT's GLoRA has no alpha.
    """
    config, tensors = _glora_config(adapter), dict[str, Tensor]()
    for path, layer in adapter.layers.items():
        tensors |= {f"{path}.glora_{key}": tensor for key, tensor in _glora_layer(path, layer, adapter).items()}
    return Written(config, tensors)


def _glora_layer(path: str, layer: LayerSpec, adapter: AdapterSpec) -> dict[str, Tensor]:
    """A layer's tensors under PEFT's names."""
    tensors: dict[str, Tensor] = {}
    for name, form in layer.config.forms.items():
        if form == "lora":
            left = adapter.tensors[join(path, f"{name}.left")]
            tensors[f"{name}.Xd"] = wide(left) * layer.config.scaling
            tensors[f"{name}.Xu"] = adapter.tensors[join(path, f"{name}.right")]
        elif form != "none":
            tensors[f"{name}.X"] = adapter.tensors[join(path, f"{name}.value")]
        else:
            o, i = layer.out_features, layer.in_features
            if o is None or i is None:
                raise ValueError(f"PEFT keeps zeros of W0's size for a path of none; that of {path!r} is not known.")
            tensors[f"{name}.zeros"] = torch.zeros({"C": (i, 1), "D": (o,), "E": (o,)}.get(name, (o, i)))
    return tensors


def _glora_config(adapter: AdapterSpec) -> dict[str, Any]:
    """PEFT's config of an adapter."""
    layers = adapter.layers
    problems: list[str] = []
    for path, layer in layers.items():
        forms = layer.config.forms
        if not layer.is_linear:
            problems.append(f"{path!r} is no linear layer")
        for one, other in ("AB", "DE"):
            if forms[one] != forms[other]:
                problems.append(f"{path!r} has {one}={forms[one]} and {other}={forms[other]}, which must be one form")
        if layer.config.product != "hadamard" and layer.config.A not in ("none", "constant"):
            problems.append(f"{path!r} has product={layer.config.product!r}, which must be 'hadamard'")
        if layer.config.create_bias or (layer.bias is False and any(forms[name] != "none" for name in "CDE")):
            problems.append(f"{path!r} has a bias that was created, which PEFT's layers cannot have")
    form_of: dict[str, str] = {}
    for name, field in FIELDS.items():
        # A layer without a bias has no C, D and E in PEFT either, whatever the config says.
        forms = {layer.config.forms[name] for layer in layers.values() if name in "AB" or layer.bias is not False}
        form_of[field] = next(iter(forms), "none")
        if len(forms) > 1:
            problems.append(f"its layers differ in the form of {name}, which must be one for all")
    ranks = {layer.rank for layer in layers.values() if layer.rank is not None}
    if len(ranks) > 1:
        problems.append(f"its layers have ranks {sorted(ranks)}, which must be one for all")
    if problems:
        raise ValueError(format_problems(problems))
    return {
        "peft_type": "GLORA",
        "r": max(ranks, default=8),
        **form_of,
        # A regex: PEFT takes a list as suffixes, which reach other layers too.
        "target_modules": "|".join(re.escape(path) for path in layers),
        "init_weights": True,
    }
