"""An adapter as PEFT's GLoRA (Note [PEFT's forms])."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glora.files.container import ADAPTER_FILE, CONFIG_FILE, PEFT_CONFIG_FILE, replace_files
from glora.interop.peft.methods import FIELDS, PREFIX
from glora.interop.tensors import tensor_file
from glora.precision import wide
from glora.spec import AdapterSpec, LayerSpec, join
from glora.text import format_problems


def write_peft(directory: Path, adapter: AdapterSpec) -> None:
    """Write an adapter as PEFT's GLoRA.

    Raises:
        ValueError: PEFT's GLoRA cannot hold it; nothing is written.
    """
    config, tensors = _config(adapter), dict[str, Tensor]()
    for path, layer in adapter.layers.items():
        tensors |= {f"{PREFIX}{path}.glora_{key}": tensor for key, tensor in _layer(path, layer, adapter).items()}
    for path, names in adapter.heads.items():
        tensors |= {f"{PREFIX}{join(path, name)}": adapter.tensors[join(path, name)] for name in names}
    contents = {
        directory / ADAPTER_FILE: tensor_file(tensors, adapter.base),
        directory / PEFT_CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True).encode(),
    }
    replace_files(contents, obsolete=[directory / CONFIG_FILE])


def _layer(path: str, layer: LayerSpec, adapter: AdapterSpec) -> dict[str, Tensor]:
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


def _config(adapter: AdapterSpec) -> dict[str, Any]:
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
    if "" in layers:
        problems.append("it is on the model itself, and PEFT adapts layers inside of a model")
    if not layers:
        problems.append("it adapts no layer")
    problems += [f"{key!r} is tied to {owner!r}, and PEFT's copy of that is not" for key, owner in adapter.ties.items()]
    if problems:
        raise ValueError(
            f"PEFT's GLoRA has one form for A and B and one for D and E, in all layers alike; this adapter cannot be "
            f"written for it, and nothing was. Found: {format_problems(problems)}. Keep it with glora.save."
        )
    return {
        "peft_type": "GLORA",
        "r": max(ranks, default=8),
        **form_of,
        # A regex: PEFT takes a list as suffixes, which reach other layers too.
        "target_modules": "|".join(re.escape(path) for path in layers),
        "modules_to_save": sorted(adapter.heads) or None,
        "bias": "none",
        "init_weights": True,
        "inference_mode": True,
        "base_model_name_or_path": None,
        "task_type": None,
        "revision": None,
    }
