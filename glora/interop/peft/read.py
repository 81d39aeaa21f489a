"""PEFT's files, checked, as an adapter apart from any model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from glora.files.base import read_base
from glora.files.container import ADAPTER_FILE, PEFT_CONFIG_FILE, parse_json, read_safetensors
from glora.interop.peft.methods import METHODS
from glora.matrices import TRANSPOSED
from glora.spec import AdapterFileError, AdapterSpec, LayerSpec, join
from glora.text import format_names

PREFIX = "base_model.model."

# What a config may say without changing what its tensors mean; anything else that is set is refused by name.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_type"),
    *("peft_version", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("r", "rank_pattern", "alpha_pattern", "lora_alpha", "use_rslora", "lora_bias", "feedforward_modules"),
    *("config_A_B", "config_C", "config_D_E", "init_weights", "init_ia3_weights", "megatron_core", "qalora_group_size"),
    "fan_in_fan_out",  # the layer's own layout (Conv1D): the factors are those of the matrix either way
    *("lora_dropout", "hira_dropout", "eva_config", "runtime_config"),  # of training, or of the start
}
# Starts that change the base model's own weights: their tensors are right beside those changed weights alone.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# A key of an adapter: its layer's path, and the tensor in it.
_KEY = re.compile(r"(?:(?P<path>.*)\.)?(?P<part>(?:lora|hira|glora|ia3)_.*)")


def read_peft(directory: Path) -> AdapterSpec:
    """The adapter in PEFT's files.

    Raises:
        AdapterFileError: they are damaged, or ask for what glora does not do.
        FileNotFoundError: no config.
    """
    file, config_file = directory / ADAPTER_FILE, directory / PEFT_CONFIG_FILE
    if not config_file.exists():
        raise FileNotFoundError(
            f"An adapter of PEFT is a folder with {PEFT_CONFIG_FILE}; there is none at {directory}. glora.load reads "
            f"glora's own."
        )
    raw = parse_json(config_file.read_bytes(), config_file)
    config = cast("dict[str, Any]", raw if isinstance(raw, dict) else {})
    method = config.get("peft_type")
    if not isinstance(method, str):
        raise AdapterFileError(f"{config_file} is not a config of PEFT: it names no peft_type.")
    if method not in METHODS:
        raise AdapterFileError(f"Of PEFT's methods glora reads {', '.join(METHODS)}; {config_file} is of {method}.")
    _refuse_unsupported(config, config_file)
    tensors = read_safetensors(file).tensors
    foreign = [key for key in tensors if not key.startswith(PREFIX)]
    if foreign:
        raise AdapterFileError(f"Keys of PEFT begin with {PREFIX!r}; {file} has {format_names(foreign)}.")
    try:
        adapter = _read(config, {key.removeprefix(PREFIX): tensors[key] for key in sorted(tensors)})
        return replace(adapter, base=read_base(file))
    except Exception as error:  # whatever values that PEFT would not write lead to
        raise AdapterFileError(f"{file} and {config_file} do not go together: {error}.") from error


def _read(config: Mapping[str, Any], given: Mapping[str, Tensor]) -> AdapterSpec:
    saved: Any = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(module, str) for module in cast("list[Any]", saved)):
        raise TypeError(f"modules_to_save must be a list of names, and is {saved!r}")
    parts: dict[str, dict[str, Tensor]] = {}
    layers: dict[str, LayerSpec] = {}
    heads: dict[str, tuple[str, ...]] = {}
    tensors: dict[str, Tensor] = {}
    for key, tensor in given.items():
        match = _KEY.fullmatch(key)
        in_saved = any(f".{module}." in f".{key}" for module in cast("list[str]", saved))
        if match is not None and (match["path"] or not in_saved):
            parts.setdefault(match["path"] or "", {})[match["part"]] = tensor
        elif in_saved:
            path, _, name = key.rpartition(".")
            heads[path] = (*heads.get(path, ()), name)
            tensors[key] = tensor
        else:
            raise ValueError(f"{key!r} belongs to no adapter's layer, and to no module of modules_to_save")
    for path, own in parts.items():
        layer, found = METHODS[config["peft_type"]](config, path, own)
        layers[path] = replace(layer, matrix=TRANSPOSED) if config.get("fan_in_fan_out") else layer
        if own:
            raise ValueError(f"{path!r} has {format_names(own)}, which glora has no path for")
        tensors |= {join(path, key): tensor for key, tensor in found.items()}
    return AdapterSpec(layers, heads, tensors)


def _refuse_unsupported(config: Mapping[str, Any], file: Path) -> None:
    """Raise where the config asks for something that changes what the tensors mean."""
    start = config.get("init_lora_weights")
    known = {"bias": "none"}
    if not any(name in str(start).lower() for name in _CHANGES_BASE):
        known["init_lora_weights"] = cast("str", start)
    asked = {key: value for key, value in config.items() if value and key not in _HARMLESS}
    problems = [f"{key}={value!r}" for key, value in asked.items() if key not in known or known[key] != value]
    if problems:
        raise AdapterFileError(
            f"glora computes PEFT's {config['peft_type']} as its paper has it; {file} also asks for "
            f"{format_names(problems)}, which it does not do. Merge the adapter with PEFT, or train it without."
        )
