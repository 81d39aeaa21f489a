"""PEFT's files, checked and read as an AdapterSpec."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from glora.files.container import ADAPTER_FILE, PEFT_CONFIG_FILE, parse_json
from glora.fingerprint import Fingerprint
from glora.interop.peft.methods import METHODS, PREFIX
from glora.interop.tensors import read_tensors
from glora.matrices import TRANSPOSED
from glora.spec import AdapterFileError, AdapterSpec, LayerSpec, join
from glora.text import format_names

# Fields that do not change what the tensors mean, or that are read here. Any other that is set is refused by name.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_type"),
    *("peft_version", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("r", "rank_pattern", "alpha_pattern", "lora_alpha", "use_rslora", "lora_bias", "feedforward_modules"),
    *("config_A_B", "config_C", "config_D_E", "init_weights", "init_ia3_weights", "megatron_core", "qalora_group_size"),
    "fan_in_fan_out",  # the layer's layout (Conv1D): the factors are those of the matrix either way
    *("lora_dropout", "hira_dropout", "eva_config", "runtime_config"),  # only for training, or for the start
}
# Starts that change the base model's weights: their tensors fit those changed weights alone.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# A key of an adapter: its layer's path, and the tensor in it.
_KEY = re.compile(r"(?:(?P<path>.*)\.)?(?P<part>(?:lora|hira|glora|ia3)_.*)")


def read_peft(directory: Path) -> AdapterSpec:
    """The adapter in PEFT's files.

    Raises:
        AdapterFileError: they are damaged, or need something that glora does not do.
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
    if not isinstance(method, str) or method not in METHODS:
        raise AdapterFileError(f"Of PEFT's methods glora reads {', '.join(METHODS)}; {config_file} has {method!r}.")
    _refuse_unsupported(config, config_file)
    tensors, base = read_tensors(file)
    foreign = [key for key in tensors if not key.startswith(PREFIX)]
    if foreign:
        raise AdapterFileError(f"Keys of PEFT begin with {PREFIX!r}; {file} has {format_names(foreign)}.")
    try:
        return _read(config, {key.removeprefix(PREFIX): tensors[key] for key in sorted(tensors)}, base)
    except Exception as error:  # a config with values that PEFT would not write raises anything
        raise AdapterFileError(f"{file} and {config_file} do not go together: {error}.") from error


def _read(config: Mapping[str, Any], theirs: Mapping[str, Tensor], base: Mapping[str, Fingerprint]) -> AdapterSpec:
    saved: Any = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(module, str) for module in cast("list[Any]", saved)):
        raise TypeError(f"modules_to_save must be a list of names, and is {saved!r}")
    by_path: dict[str, dict[str, Tensor]] = {}
    layers: dict[str, LayerSpec] = {}
    heads: dict[str, tuple[str, ...]] = {}
    tensors: dict[str, Tensor] = {}
    for key, tensor in theirs.items():
        match = _KEY.fullmatch(key)
        is_saved = any(f".{module}." in f".{key}" for module in cast("list[str]", saved))
        if match is not None and (match["path"] or not is_saved):
            by_path.setdefault(match["path"] or "", {})[match["part"]] = tensor
        elif is_saved:
            path, _, name = key.rpartition(".")
            heads[path] = (*heads.get(path, ()), name)
            tensors[key] = tensor
        else:
            raise ValueError(f"{key!r} belongs to no adapter's layer, and to no module of modules_to_save")
    for path, parts in by_path.items():
        layer, ours = METHODS[config["peft_type"]](config, path, parts)
        layers[path] = replace(layer, matrix=TRANSPOSED) if config.get("fan_in_fan_out") else layer
        if parts:
            raise ValueError(f"{path!r} has {format_names(parts)}, which glora has no path for")
        tensors |= {join(path, key): tensor for key, tensor in ours.items()}
    return AdapterSpec(layers, heads, tensors, base=base)


def _refuse_unsupported(config: Mapping[str, Any], file: Path) -> None:
    """Raise where the config has something that changes what the tensors mean."""
    harmless = set(_HARMLESS)
    if config.get("bias") == "none":
        harmless.add("bias")
    if not any(start in str(config.get("init_lora_weights")).lower() for start in _CHANGES_BASE):
        harmless.add("init_lora_weights")
    problems = [f"{key}={value!r}" for key, value in config.items() if value and key not in harmless]
    if problems:
        raise AdapterFileError(
            f"glora computes PEFT's {config['peft_type']} as in its paper; {file} also has {format_names(problems)}, "
            f"which glora does not do. Merge the adapter with PEFT, or train it without."
        )
