"""PEFT's files, checked and read as an AdapterSpec."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from glora.files.container import ADAPTER_FILE, PEFT_CONFIG_FILE, parse_json
from glora.fingerprint import Fingerprint
from glora.interop.base import Base
from glora.interop.peft import methods, updates
from glora.interop.peft.beside import add_biases, is_embedding, tie
from glora.interop.peft.methods import PREFIX, Given, Reader
from glora.interop.peft.rows import add_rows, as_layer, row_indices
from glora.interop.tensors import read_tensors
from glora.spec import AdapterFileError, AdapterSpec, LayerSpec, join
from glora.text import format_names

PICKLED_FILE = "adapter_model.bin"  # what PEFT wrote before safetensors: read as tensors alone


def _nothing(given: Given, _theirs: dict[str, Tensor]) -> methods.Read:
    raise ValueError(f"{given.path!r} has tensors of a method that has none in layers")


METHODS: dict[str, Reader] = {
    "GLORA": methods.read_glora,
    "LORA": methods.read_lora,
    "HIRA": methods.read_hira,
    "IA3": methods.read_ia3,
    "ADALORA": updates.read_adalora,
    "LOHA": updates.read_loha,
    "LOKR": updates.read_lokr,
    "MISS": updates.read_miss,
    "VERA": updates.read_vera,
    "VBLORA": updates.read_vblora,
    "RANDLORA": updates.read_randlora,
    "LN_TUNING": _nothing,
    "TRAINABLE_TOKENS": _nothing,
}
# Why the formula does not hold another method's adapters.
_REASONS = {
    "the formula has no place for a rotation of W0": ("OFT", "BOFT", "HRA", "ROAD", "PSOFT", "OSF"),
    "it adds to the model's input, and changes no layer": (
        *(
            "PROMPT_TUNING",
            "P_TUNING",
            "PREFIX_TUNING",
            "MULTITASK_PROMPT_TUNING",
            "CPT",
            "ADAPTION_PROMPT",
            "CARTRIDGE",
        ),
    ),
    "its update is neither of a low rank nor a scaling of W0": (
        *("FOURIERFT", "WAVEFT", "C3A", "SHIRA", "SUPERTUNING"),
    ),
    "what it adds depends on the input": ("XLORA", "POLY", "PEANUT", "SHADOW"),
}
# Fields that do not change what the tensors mean, or that are read. Any other that is set is refused by name.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_type", "bias"),
    *("peft_version", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("r", "rank_pattern", "alpha_pattern", "lora_alpha", "use_rslora", "lora_bias", "feedforward_modules", "use_dora"),
    *("config_A_B", "config_C", "config_D_E", "init_weights", "init_ia3_weights", "megatron_core", "qalora_group_size"),
    *("target_parameters", "trainable_token_indices", "token_indices", "ensure_weight_tying"),
    "fan_in_fan_out",  # the layer's layout (Conv1D): the factors are those of the matrix either way
    *("lora_dropout", "hira_dropout", "eva_config", "runtime_config"),  # only for training, or for the start
    *("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),  # AdaLoRA
    *("alpha", "rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d"),  # LoHa, LoKr
    *("decompose_both", "decompose_factor", "miss_dropout", "mini_r"),
    *("projection_prng_key", "save_projection", "vera_dropout", "d_initial"),  # VeRA, RandLoRA
    *("randlora_alpha", "randlora_dropout", "sparse", "very_sparse"),
    *("num_vectors", "vector_length", "topk", "save_only_topk_weights", "vblora_dropout"),  # VB-LoRA
    *("init_vector_bank_bound", "init_logits_std"),
}
# Starts that change the base model's weights: their tensors fit those changed weights alone.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# A key of an adapter: its layer's path, and the tensor in it.
_PARTS = "lora|hira|glora|ia3|hada|lokr|miss|vera_lambda|vblora_logits|randlora|ln_tuning_layers|trainable_tokens"
_KEY = re.compile(rf"(?:(?P<path>.*)\.)?(?P<part>(?:{_PARTS})[_.].*)")
_SHARED = ("vera_A", "vera_B", "randlora_A", "randlora_B", "vblora_vector_bank")


def read_peft(directory: Path, base: Base = Base()) -> AdapterSpec:  # noqa: B008 - immutable
    """The adapter in PEFT's files.

    Args:
        directory: the folder.
        base: the model that it is for; without it, what must be computed beside the base weights is refused.

    Raises:
        AdapterFileError: they are damaged, or need something that glora does not do.
        FileNotFoundError: no config, or no tensors.
    """
    file, config_file = directory / ADAPTER_FILE, directory / PEFT_CONFIG_FILE
    if not config_file.exists():
        raise FileNotFoundError(
            f"An adapter of PEFT is a folder with {PEFT_CONFIG_FILE}; there is none at {directory}. glora.load reads "
            f"glora's own."
        )
    if not file.exists() and (directory / PICKLED_FILE).exists():
        file = directory / PICKLED_FILE
    raw = parse_json(config_file.read_bytes(), config_file)
    config = cast("dict[str, Any]", raw if isinstance(raw, dict) else {})
    _refuse_method(config.get("peft_type"), config_file)
    _refuse_unsupported(config, config_file)
    tensors, fingerprints = read_tensors(file)
    try:
        with torch.no_grad():
            return _File(config, tensors, base).read(fingerprints)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # a config with values that PEFT would not write raises anything
        raise AdapterFileError(f"{file} and {config_file} do not go together: {error}.") from error


class _File:
    """A file being read: its layers, heads and tensors so far."""

    def __init__(self, config: Mapping[str, Any], theirs: Mapping[str, Tensor], base: Base) -> None:
        self.config, self.base = config, base
        if base.partial and config.get("fan_in_fan_out"):
            raise ValueError(
                "it says fan_in_fan_out, and which layers hold their weights transposed (Conv1D) is told by the model: "
                "give its folder, or load the adapter into it"
            )
        self.saved = _names(config, "modules_to_save")
        self.shared: dict[str, Tensor] = {}
        self.theirs: dict[str, Tensor] = {}
        foreign: list[str] = []
        for key in sorted(theirs):
            if key.startswith(PREFIX):
                self.theirs[key.removeprefix(PREFIX)] = theirs[key]
            elif key.removeprefix("base_model.") in _SHARED:
                self.shared[key.removeprefix("base_model.")] = theirs[key]
            else:
                foreign.append(key)
        if foreign:
            raise ValueError(f"keys of PEFT begin with {PREFIX!r}, and there is {format_names(foreign)}")
        self.layers: dict[str, LayerSpec] = {}
        self.heads: dict[str, tuple[str, ...]] = {}
        self.tensors: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.rows: set[str] = set()  # of which some rows were trained

    def read(self, fingerprints: Mapping[str, Fingerprint]) -> AdapterSpec:
        """The adapter."""
        by_path: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.theirs.items():
            match = _KEY.fullmatch(key)
            if match is not None and (match["path"] or not self._is_saved(key)):
                by_path.setdefault(match["path"] or "", {})[match["part"]] = tensor
            else:
                self._beside(key, tensor)
        by_path = self._by_parameter(by_path)
        for path, parts in by_path.items():
            self._layer(path, parts, list(by_path))
        if self.biases:
            add_biases(self.biases, self.base, self.layers, self.heads, self.tensors)
        ties = tie(self.config, self.base, self.heads, self.tensors, self.rows)
        return AdapterSpec(self.layers, self.heads, self.tensors, ties, base=fingerprints)

    def _is_saved(self, key: str) -> bool:
        return any(f".{module}." in f".{key}" for module in self.saved)

    def _beside(self, key: str, tensor: Tensor) -> None:
        """A tensor that is of no layer's method: of a head, a bias, or the base's own."""
        path, _, name = key.rpartition(".")
        plain = path.replace(".base_layer", "").removesuffix(".original_module").removesuffix(".modules_to_save")
        if self._is_saved(key) and plain == path:
            self._head(path, name, tensor)
        elif name == "bias" and self.config.get("bias") not in (None, "none"):
            if not self._is_saved(key):
                self.biases[plain] = tensor
        elif name == "weight" and is_embedding(self.base, plain):
            held = self.base.owners[plain].tensors["weight"]
            if held.shape != tensor.shape:
                raise ValueError(
                    f"{plain!r} has {len(tensor)} rows, and {len(held)} here: call "
                    f"model.resize_token_embeddings({len(tensor)}) first"
                )
            if plain == path:
                self._head(path, name, tensor)
            elif not torch.equal(held.detach().cpu().to(tensor), tensor):
                raise ValueError(f"{plain!r} was adapted beside other rows than this model has, which the file holds")
        else:
            raise ValueError(f"{key!r} belongs to no adapter's layer, and to no module of modules_to_save")

    def _head(self, path: str, name: str, tensor: Tensor) -> None:
        self.heads[path] = (*self.heads.get(path, ()), name)
        self.tensors[join(path, name)] = tensor

    def _by_parameter(self, by_path: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """The same, with the parameters of `target_parameters` under their own paths (Note [PEFT's experts])."""
        targets = _names(self.config, "target_parameters")
        found: dict[str, dict[str, Tensor]] = {}
        for path, parts in by_path.items():
            module = path.replace(".base_layer", "")
            owner = self.base.owners.get(module)
            named = [
                name for name in (owner.module._parameters if owner else ()) if _is_target(join(module, name), targets)
            ]
            if f"{module}.in_proj_weight" in self.base.sites and module not in self.base.sites:
                found[f"{module}.in_proj_weight"] = parts  # MultiheadAttention's; `out_proj` is a layer of its own
                continue
            if path.endswith(".base_layer.out_proj"):  # whose update PEFT's MultiheadAttention adds twice
                parts = {key: 2 * part if key == "lora_B.weight" else part for key, part in parts.items()}
            if targets and (owner is None or self.base.partial):
                raise ValueError(f"which parameters of {module!r} are adapted is told by the base model: give it")
            if not named:
                found[module] = parts
                continue
            around = path.count(".base_layer")  # the outermost is the last
            if around >= len(named):
                raise ValueError(f"{path!r} has more adapters than target_parameters has of {module!r}")
            name = named[len(named) - 1 - around]
            found[module if name == "weight" else join(module, name)] = parts
        return found

    def _rows(self, module: str, rows: Tensor) -> None:
        indices = row_indices(self.config, module, rows, self.base)
        read = as_layer(module, rows, indices, self.base)
        if read is None:
            add_rows(module, rows, indices, self.base, self.heads, self.tensors)
            self.rows.add(module)
        else:
            self.layers[module], tensors = read
            self.tensors |= {join(module, key): tensor for key, tensor in tensors.items()}

    def _layer(self, path: str, parts: dict[str, Tensor], paths: list[str]) -> None:
        for key in list(parts):
            if key.startswith("ln_tuning_layers."):
                self._head(path, key.removeprefix("ln_tuning_layers."), parts.pop(key))
            elif key == "trainable_tokens_delta":
                module = path.removesuffix(".token_adapter").removesuffix("token_adapter")
                if path != module and module in paths:
                    raise ValueError(f"{module!r} has trained rows and another adapter, which PEFT puts on none")
                self._rows(module, parts.pop(key))
        if not parts:
            return
        for key, tensor in parts.items():
            if not tensor.is_floating_point() and not key.endswith("_indices"):
                raise ValueError(f"{join(path, key)!r} is {tensor.dtype} where a floating dtype should be")
        if self.config.get("use_dora") and not any(key.startswith("lora_magnitude_vector") for key in parts):
            raise ValueError(f"{path!r} has no magnitudes, and the config says use_dora")
        read = METHODS[self.config["peft_type"]](Given(self.config, path, self.base, self.shared, paths), parts)
        if parts:
            raise ValueError(f"{path!r} has {format_names(parts)}, which glora has no path for")
        if read is not None:
            self.layers[path], tensors = read
            self.tensors |= {join(path, key): tensor for key, tensor in tensors.items()}


def _is_target(key: str, targets: list[str]) -> bool:
    return any(key == target or key.endswith(f".{target}") for target in targets)


def _names(config: Mapping[str, Any], field: str) -> list[str]:
    """A list of names in the config."""
    names: Any = config.get(field) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in cast("list[Any]", names)):
        raise TypeError(f"{field} must be a list of names, and is {names!r}")
    return cast("list[str]", names)


def _refuse_method(method: object, file: Path) -> None:
    """Raise where PEFT's method is none of ours, with the reason."""
    if isinstance(method, str) and method in METHODS:
        return
    reasons = {name: reason for reason, names in _REASONS.items() for name in names}
    reason = reasons.get(str(method))
    if reason is not None:
        raise AdapterFileError(
            f"The formula W0 + W0 * A + B must hold an adapter; {file} has one of PEFT's method {method!r}, and "
            f"{reason}. Serve it with PEFT, or merge it into the base model there."
        )
    raise AdapterFileError(f"Of PEFT's methods glora reads {', '.join(METHODS)}; {file} has {method!r}.")


def _refuse_unsupported(config: Mapping[str, Any], file: Path) -> None:
    """Raise where the config has something that changes what the tensors mean."""
    harmless = set(_HARMLESS)
    if not any(start in str(config.get("init_lora_weights")).lower() for start in _CHANGES_BASE):
        harmless.add("init_lora_weights")
    problems = [f"{key}={value!r}" for key, value in config.items() if value and key not in harmless]
    if problems:
        raise AdapterFileError(
            f"glora computes PEFT's {config['peft_type']} as in its paper; {file} also has {format_names(problems)}, "
            f"which glora does not do. Merge the adapter with PEFT, or train it without."
        )
