"""PEFT's methods: one layer's tensors and config, read as glora's."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from glora.config import GLoRAConfig
from glora.precision import wide
from glora.spec import LayerSpec

# Note [PEFT's forms]
# GLORA: glora_A to glora_E, each `Xd`, `Xu` (lora), `X` (vector, constant) or `zeros` (none, dense): left, right and
#   value of glora's, elementwise. A and B share one form, D and E another, in all layers.
# LORA: W' = W0 + s lora_B lora_A with s = alpha / r, or alpha / sqrt(r) with rslora: B alone. A lora_bias adds s times
#   a vector to the output: E.
# HIRA: W' = W0 + W0 * (hira_B hira_A): A alone.
# IA3: ia3_l (out, 1) scales outputs, bias included: A and D vectors of l - 1; (1, in) scales inputs: A of a matrix
#   product, whose vector is a diagonal.
# `modules_to_save`: all tensors of some modules, under plain keys: heads.
#
# A reader gets the config, the layer's path and its tensors. It pops each tensor that it uses; none may be left.

PREFIX = "base_model.model."  # of every key in PEFT's files

_Read = tuple[LayerSpec, dict[str, Tensor]]

# Path to the field of PEFT's config that has its form.
FIELDS = {"A": "config_A_B", "B": "config_A_B", "C": "config_C", "D": "config_D_E", "E": "config_D_E"}


def _glora(config: Mapping[str, Any], path: str, theirs: dict[str, Tensor]) -> _Read:
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
    return LayerSpec(GLoRAConfig(**forms, rank=rank or config["r"]), out_features, in_features, bias), tensors


def _lora(config: Mapping[str, Any], path: str, theirs: dict[str, Tensor]) -> _Read:
    right, left = theirs.pop("lora_A.weight"), theirs.pop("lora_B.weight")
    rank = left.shape[1]
    if rank != _of_pattern(config.get("rank_pattern"), path, config["r"]):
        raise ValueError(f"{path!r} has rank {rank}, and the config says otherwise")
    alpha = _of_pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
    ours = GLoRAConfig.lora(rank=rank, alpha=alpha * math.sqrt(rank) if config.get("use_rslora") else alpha)
    tensors = {"B.left": left, "B.right": right}
    bias = theirs.pop("lora_B.bias", None)
    if bias is not None:
        tensors["E.value"] = wide(bias) * ours.scaling
        ours = replace(ours, E="vector", create_bias=True)
    return LayerSpec(ours, left.shape[0], right.shape[1]), tensors


def _hira(_config: Mapping[str, Any], _path: str, theirs: dict[str, Tensor]) -> _Read:
    right, left = theirs.pop("hira_A"), theirs.pop("hira_B")
    rank = left.shape[1]  # not compared with rank_pattern: it scales nothing, and PEFT does not always follow it
    layer = LayerSpec(GLoRAConfig.hira(rank=rank), left.shape[0], right.shape[1])
    return layer, {"A.left": left, "A.right": right}


def _ia3(config: Mapping[str, Any], path: str, theirs: dict[str, Tensor]) -> _Read:
    feedforward: str | list[str] = config.get("feedforward_modules") or []
    scale = theirs.pop("ia3_l")
    change = wide(scale) - 1
    if isinstance(feedforward, str):
        scales_inputs = re.fullmatch(feedforward, path) is not None
    else:
        scales_inputs = any(path == entry or path.endswith(f".{entry}") for entry in feedforward)
    if scale.ndim != 2 or scale.shape[0 if scales_inputs else 1] != 1:
        vector = "(1, in), since feedforward_modules names it" if scales_inputs else "(out, 1)"
        raise ValueError(f"{path}.ia3_l has shape {tuple(scale.shape)} where a vector {vector} should be")
    if not scales_inputs:
        return LayerSpec(GLoRAConfig.ia3(), scale.shape[0], None), {"A.value": change, "D.value": change[:, 0]}
    ours = GLoRAConfig(A="vector", B="none", C="none", D="none", E="none", product="matmul")
    return LayerSpec(ours, None, scale.shape[1]), {"A.value": change}


def _of_pattern(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """A layer's entry in rank_pattern or alpha_pattern: that of the first key which, as a regex, its path ends in."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


_Reader = Callable[[Mapping[str, Any], str, dict[str, Tensor]], _Read]
METHODS: dict[str, _Reader] = {"GLORA": _glora, "LORA": _lora, "HIRA": _hira, "IA3": _ia3}
