"""PEFT's methods: one layer's tensors and config, read as glora's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from glora.config import GLoRAConfig
from glora.interop.base import Base, site_at, weight_at
from glora.interop.patterns import matches, of_pattern
from glora.matrices import EMBEDDING
from glora.precision import multiply, wide
from glora.spec import LayerSpec

# Note [PEFT's forms]
# GLORA: glora_A to glora_E, each `Xd`, `Xu` (lora), `X` (vector, constant) or `zeros` (none, dense): left, right and
#   value of glora's, elementwise. A and B share one form, D and E another, in all layers.
# LORA: W' = W0 + s lora_B lora_A with s = alpha / r, or alpha / sqrt(r) with rslora: B alone. A lora_bias adds s times
#   a vector to the output: E. With DoRA, W' = g (W0 + s lora_B lora_A) for each output (of an embedding: for each
#   feature), with g = magnitude / norm: A = g - 1, B's left is g s lora_B. The bias is not scaled.
# HIRA: W' = W0 + W0 * (hira_B hira_A): A alone.
# IA3: ia3_l (out, 1) scales outputs, bias included: A and D vectors of l - 1; (1, in) scales inputs: A of a matrix
#   product, whose vector is a diagonal.
# ADALORA, VERA, LOHA, LOKR, VBLORA, RANDLORA, MISS: an update of a low rank, made of other tensors: B (`updates`).
# `modules_to_save`: all tensors of some modules, under plain keys: heads. Biases and rows of embeddings: `beside`.
#
# Convolutions have the axes of their kernels in lora_A, hira_A and ia3_l; embeddings have `lora_embedding_A` and `_B`,
# both transposed.
#
# A reader gets the layer and its tensors. It pops each tensor that it uses; none may be left.

PREFIX = "base_model.model."  # of the key of every layer's tensor in PEFT's files

# Path to the field of PEFT's config that has its form.
FIELDS = {"A": "config_A_B", "B": "config_A_B", "C": "config_C", "D": "config_D_E", "E": "config_D_E"}


class Given(NamedTuple):
    """A layer of a file.

    Attributes:
        config: PEFT's config.
        path: the layer's; a parameter's own for one of `target_parameters`.
        base: the model that it is for.
        shared: name to tensor of what all layers share.
        paths: the paths of all layers.
    """

    config: Mapping[str, Any]
    path: str
    base: Base
    shared: Mapping[str, Tensor] = {}
    paths: Sequence[str] = ()


Read = tuple[LayerSpec, dict[str, Tensor]]
Reader = Callable[[Given, dict[str, Tensor]], "Read | None"]
"""None for a layer whose adapter does nothing."""


def read_glora(given: Given, theirs: dict[str, Tensor]) -> Read:
    """GLoRA: A to E by their forms."""
    config, path = given.config, given.path
    forms: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    out_features = in_features = rank = None
    for name, field in FIELDS.items():
        zeros = theirs.pop(f"glora_{name}.zeros", None)
        forms[name] = config[field] if zeros is None else "none"
        if zeros is not None and bool(zeros.count_nonzero()):
            raise ValueError(f"{path}.glora_{name}.zeros is not zero")
        if zeros is not None and name in "AB":
            out_features, in_features = zeros.shape
        if forms[name] == "lora":
            left, right = theirs.pop(f"glora_{name}.Xd"), theirs.pop(f"glora_{name}.Xu")
            tensors |= {f"{name}.left": left, f"{name}.right": right}
            rank = left.shape[1]
            if name in "AB":
                out_features, in_features = left.shape[0], right.shape[1]
        elif forms[name] != "none":
            tensors[f"{name}.value"] = theirs.pop(f"glora_{name}.X")
    # PEFT leaves C, D and E out where there is no bias; a config without them does not say whether there is one.
    configured = any(config[FIELDS[name]] != "none" for name in "CDE")
    bias = any(forms[name] != "none" for name in "CDE") if configured else None
    return LayerSpec(
        GLoRAConfig(**forms, rank=rank or config["r"], balance="none"), out_features, in_features, bias
    ), tensors


def read_lora(given: Given, theirs: dict[str, Tensor]) -> Read:
    """LoRA, with DoRA and lora_bias, on layers of every kind."""
    config, path = given.config, given.path
    parameter = path in given.base.sites and given.base.sites[path].matrix.weight != "weight"
    is_embedding = "lora_embedding_A" in theirs
    if is_embedding:
        left, right = theirs.pop("lora_embedding_A").mT, theirs.pop("lora_embedding_B").mT
    else:
        right, left = theirs.pop("lora_A.weight"), theirs.pop("lora_B.weight")
        if right.ndim > 2:
            refuse_unlike_convolution(path, site_at(given.base, path).module)
        left, right = _experts(given, left, right) if parameter else (left.flatten(1), right.flatten(1))
    rank = left.shape[-1]
    if rank != of_pattern(config.get("rank_pattern"), path, config["r"]):
        raise ValueError(f"{path!r} has rank {rank}, and the config says otherwise")
    alpha = of_pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
    ours = GLoRAConfig.lora(rank=rank, alpha=alpha * math.sqrt(rank) if config.get("use_rslora") else alpha)
    magnitude = theirs.pop("lora_magnitude_vector", theirs.pop("lora_magnitude_vector.weight", None))
    layer = LayerSpec(ours, left.shape[-2], right.shape[-1])
    if is_embedding:
        layer = replace(layer, matrix=EMBEDDING)
    elif parameter:
        layer = replace(layer, matrix=given.base.sites[path].matrix, batch=tuple(left.shape[:-2]))
    if magnitude is not None:
        return _dora(given, layer, left, right, magnitude)
    tensors = {"B.left": left, "B.right": right}
    bias = theirs.pop("lora_B.bias", None)
    if bias is not None:
        tensors["E.value"] = wide(bias) * ours.scaling
        layer = replace(layer, config=replace(ours, E="vector", create_bias=True))
    return layer, tensors


def _dora(given: Given, layer: LayerSpec, left: Tensor, right: Tensor, magnitude: Tensor) -> Read:
    W0, scaling = weight_at(given.base, given.path), layer.config.scaling
    if W0.shape != (layer.out_features, layer.in_features):
        raise ValueError(f"{given.path!r} has a weight of {tuple(W0.shape)} here")
    by_rows = layer.matrix != EMBEDDING
    moved = W0 + multiply(left, right) * scaling
    g = wide(magnitude).flatten() / moved.square().sum(1 if by_rows else 0).sqrt()
    if not bool(g.isfinite().all()):
        raise ValueError(f"{given.path!r} has magnitudes for outputs whose weights are zero")
    g = g.unsqueeze(1 if by_rows else 0)
    forms: dict[str, Any] = {"A": "vector", "product": "hadamard" if by_rows else "matmul"}
    config = replace(layer.config, alpha=None, **forms)
    left, right = wide(left) * scaling, wide(right)
    left, right = (left * g, right) if by_rows else (left, right * g)
    return replace(layer, config=config), {"A.value": g - 1, "B.left": left, "B.right": right}


# Note [PEFT's experts]
# `target_parameters` wraps a module once for each parameter of it, the first in the module's own order innermost; each
# wrapper but the outermost has `.base_layer` in its keys, once for each wrapper around it. A parameter of three axes
# `(experts, p, q)` gets the update `P Q` for each expert, with P `(p, r)` and Q `(r, q)`: lora_B is P and lora_A is Q,
# or where the module says `is_transposed`, lora_A is P^T and lora_B is Q^T. lora_A is `(experts r, in)` and lora_B
# `(out, r experts)`, the expert last.
def _experts(given: Given, lora_B: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor]:
    """left and right of a parameter."""
    site, p, q = given.base.sites[given.path], lora_B, lora_A
    if len(site.matrix.axes) == 3:
        experts = len(site.owner.tensors[site.matrix.weight])
        if q.ndim != 2 or p.ndim != 2 or len(q) % experts or p.shape[1] != len(q):
            raise ValueError(
                f"{given.path!r} has factors of {tuple(q.shape)} and {tuple(p.shape)} for {experts} experts"
            )
        q, p = q.reshape(experts, -1, q.shape[1]), p.reshape(len(p), -1, experts).permute(2, 0, 1)
        if getattr(site.module, "is_transposed", False):
            p, q = q.mT, p.mT
    return (p, q) if site.matrix.is_plain else (q.mT, p.mT)


def refuse_unlike_convolution(path: str, module: Any) -> None:
    """Raise where PEFT's `lora_A`, a convolution without dilation, groups or other padding, is unlike the layer's own.

    Raises:
        ValueError: it is.
    """
    if module.groups != 1 or module.padding_mode != "zeros" or set(module.dilation) != {1}:
        raise ValueError(
            f"{path!r} is a convolution with groups={module.groups}, dilation={module.dilation} and "
            f"padding_mode={module.padding_mode!r}; PEFT's LoRA computes its update without them"
        )


def read_hira(_given: Given, theirs: dict[str, Tensor]) -> Read:
    """HiRA: A low rank, elementwise."""
    if "hira_embedding_A" in theirs:
        left, right = theirs.pop("hira_embedding_A").mT, theirs.pop("hira_embedding_B").mT
        layer = LayerSpec(
            GLoRAConfig.hira(rank=left.shape[1], balance="none"), len(left), right.shape[1], matrix=EMBEDDING
        )
        return layer, {"A.left": left, "A.right": right}
    right, left = theirs.pop("hira_A").flatten(1), theirs.pop("hira_B").flatten(1)
    rank = left.shape[1]  # not compared with rank_pattern: it scales nothing, and PEFT does not always follow it
    layer = LayerSpec(GLoRAConfig.hira(rank=rank, balance="none"), left.shape[0], right.shape[1])
    return layer, {"A.left": left, "A.right": right}


def read_ia3(given: Given, theirs: dict[str, Tensor]) -> Read:
    """IA3: vectors that scale outputs, or inputs."""
    path, scale = given.path, theirs.pop("ia3_l")
    feedforward: str | list[str] = given.config.get("feedforward_modules") or []
    if isinstance(feedforward, str):
        scales_inputs = matches(feedforward, path)
    else:
        scales_inputs = any(path.endswith(entry) for entry in feedforward)  # PEFT asks for no dot before it
    kernel = tuple(scale.shape[2:])
    if kernel:  # a convolution's, (1, channels, 1, ...)
        scale = scale.reshape(1, -1) if scales_inputs else scale.reshape(-1, 1)
    change = wide(scale) - 1
    if scale.ndim != 2 or scale.shape[0 if scales_inputs else 1] != 1 or set(kernel) - {1}:
        vector = "(1, in), since feedforward_modules names it" if scales_inputs else "(out, 1)"
        raise ValueError(f"{path}.ia3_l has shape {tuple(scale.shape)} where a vector {vector} should be")
    if not scales_inputs:
        return LayerSpec(GLoRAConfig.ia3(), scale.shape[0], None), {"A.value": change, "D.value": change[:, 0]}
    if kernel:
        site = site_at(given.base, path)
        if getattr(site.module, "groups", 1) != 1:
            raise ValueError(f"{path!r} is a convolution with groups, whose inputs no one vector scales")
        change = change.repeat_interleave(math.prod(site.owner.tensors["weight"].shape[2:]), 1)
    ours = GLoRAConfig(A="vector", B="none", C="none", D="none", E="none", product="matmul")
    return LayerSpec(ours, None, change.shape[1]), {"A.value": change}
