"""Hugging Face PEFT: its GLoRA both ways; LoRA, IA3 and HiRA into glora."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from glora.config import GLoRAConfig
from glora.files.container import (
    ADAPTER_FILE,
    CONFIG_FILE,
    adapter_file,
    import_optional,
    parse_json,
    read_safetensors,
    replace_file,
)
from glora.functional import working_dtype
from glora.model.attach import attach_spec
from glora.model.describe import describe
from glora.model.modules import Model
from glora.spec import AdapterFileError, AdapterSpec, LayerSpec
from glora.text import format_names

# Note [PEFT's forms]
# GLORA: glora_A to glora_E, each `Xd`, `Xu` (lora), `X` (vector, constant) or `zeros` (none, dense): our left, right
#   and value, elementwise. A and B share one form, D and E another, in all layers.
# LORA: W' = W0 + s lora_B lora_A with s = alpha / r, or alpha / sqrt(r) with rslora: B alone. A lora_bias adds s times
#   a vector to the output: E.
# HIRA: W' = W0 + W0 * (hira_B hira_A): A alone.
# IA3: ia3_l (out, 1) scales outputs, bias included: A and D vectors of l - 1; (1, in) scales inputs: A of a matrix
#   product, whose vector is a diagonal.
# `modules_to_save`: whole modules, under plain keys: heads.

_PREFIX = "base_model.model."

# What a config may say without changing what its tensors mean; anything else that is set is refused by name.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_type"),
    *("peft_version", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("r", "rank_pattern", "alpha_pattern", "lora_alpha", "use_rslora", "lora_bias", "feedforward_modules"),
    *("config_A_B", "config_C", "config_D_E", "init_weights", "init_ia3_weights", "megatron_core", "qalora_group_size"),
    *("lora_dropout", "hira_dropout", "eva_config", "runtime_config"),  # of training, or of the start
}
# Starts that change the base model's own weights: their tensors are right beside those changed weights alone.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def load_peft(
    model: Model, directory: str | os.PathLike[str], name: str = "default", *, trainable: bool = True
) -> Model:
    r"""Attach an adapter that PEFT's `save_pretrained` wrote: GLoRA, LoRA, IA3 or HiRA.

    It computes what PEFT's does, with

    | PEFT | glora |
    |---|---|
    | GLORA | A to E, elementwise |
    | LORA | B (`alpha / r` or, with rslora, `alpha / sqrt(r)`; rank and alpha patterns); its lora_bias is E |
    | HIRA | A, elementwise |
    | IA3 | A and D vectors (outputs), or an A vector of the matrix product (inputs) |
    | modules_to_save | heads, as by `trainable=` |

    PEFT itself is not needed. Dropout of the input (lora_dropout), which acts in training alone, is not taken over.

    Args:
        model: the base model that PEFT wrapped.
        directory: the folder with `adapter_config.json` and `adapter_model.safetensors`.
        name: the adapter's name in the model.
        trainable: whether its tensors ask for gradients.

    Returns:
        The model; the adapter is the only active one.

    Raises:
        glora.AdapterFileError: files that are damaged, of another method, or with something that glora does not do
            (DoRA, trained base biases, starts that change the base weights), named; or that do not fit the model.
        FileNotFoundError: no such files.

    Source: Hugging Face PEFT 0.21.
    """
    file = adapter_file(directory)
    return attach_spec(model, read_peft(file.parent), file, name=name, trainable=trainable)


def save_peft(model: nn.Module, directory: str | os.PathLike[str], name: str | None = None) -> None:
    """Write one adapter as PEFT's GLoRA does, for `PeftModel.from_pretrained(base_model, directory)`.

    `alpha / rank` is multiplied into the left factors, since PEFT's GLoRA has none. Rank dropout is left out.

    Args:
        model: the model.
        directory: the folder; made if it is not there.
        name: the adapter; None for the only one.

    Raises:
        ValueError: what PEFT's GLoRA cannot say, named: A and B (or D and E) of different forms in one layer, layers
            that differ in forms or rank, a matrix product, a created bias. Nothing is written then.
        KeyError: no adapter of that name.
    """
    write_peft(Path(directory), describe(model, name))


def read_peft(directory: Path) -> AdapterSpec:
    """The adapter in PEFT's files."""
    file, config_file = directory / ADAPTER_FILE, directory / CONFIG_FILE
    if not config_file.exists():
        raise FileNotFoundError(f"An adapter of PEFT is a folder with {CONFIG_FILE}; there is none at {directory}.")
    raw = parse_json(config_file.read_bytes(), config_file)
    config = cast("dict[str, Any]", raw if isinstance(raw, dict) else {})
    if not isinstance(config.get("peft_type"), str):
        raise AdapterFileError(f"{config_file} is not a config of PEFT: it names no peft_type.")
    readers = {"GLORA": _read_glora, "LORA": _read_lora, "HIRA": _read_hira, "IA3": _read_ia3}
    if config["peft_type"] not in readers:
        raise AdapterFileError(
            f"Of PEFT's methods glora reads {', '.join(readers)}; {config_file} is of {config['peft_type']}."
        )
    _refuse_what_is_not_done(config, config_file)
    tensors, _ = read_safetensors(file)
    foreign = [key for key in tensors if not key.startswith(_PREFIX)]
    if foreign:
        raise AdapterFileError(f"Keys of PEFT begin with {_PREFIX!r}; {file} has {format_names(foreign)}.")
    tensors = {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}
    saved = cast("list[str]", config.get("modules_to_save") or [])
    heads = {key: tensor for key, tensor in tensors.items() if any(_is_inside(key, module) for module in saved)}
    try:
        adapter = readers[config["peft_type"]](config, _by_layer(tensors.keys() - heads.keys(), tensors))
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise AdapterFileError(f"{file} and {config_file} do not go together: {error}.") from error
    owners = {key: key.rpartition(".")[0] for key in heads}
    names = {path: tuple(k.rpartition(".")[2] for k in heads if owners[k] == path) for path in owners.values()}
    return AdapterSpec(adapter.layers, names, {**adapter.tensors, **heads})


def write_peft(directory: Path, adapter: AdapterSpec) -> None:
    """Write a described adapter as PEFT's GLoRA."""
    safetensors = import_optional("safetensors.torch")
    config = _glora_config(adapter)
    tensors: dict[str, Tensor] = {}
    for path, layer in adapter.layers.items():
        for name, form in layer.config.forms.items():
            key = f"{_PREFIX}{path}.glora_{name}"
            ours = f"{path}.{name}" if path else name
            if form == "lora":
                left = adapter.tensors[f"{ours}.left"]
                tensors[f"{key}.Xd"] = left.to(working_dtype(left)) * layer.config.scaling
                tensors[f"{key}.Xu"] = adapter.tensors[f"{ours}.right"]
            elif form != "none":
                tensors[f"{key}.X"] = adapter.tensors[f"{ours}.value"]
            else:
                shape = {"C": (layer.in_features, 1), "D": (layer.out_features,), "E": (layer.out_features,)}
                size = shape.get(name, (layer.out_features, layer.in_features))
                if any(number is None for number in size):
                    raise ValueError(
                        f"PEFT keeps zeros of W0's size for a path of none; that of {path!r} is not known."
                    )
                tensors[f"{key}.zeros"] = torch.zeros(cast("tuple[int, ...]", size))
    for path, names in adapter.heads.items():
        tensors |= {f"{_PREFIX}{path}.{name}": adapter.tensors[f"{path}.{name}"] for name in names}
    data = safetensors.save({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / ADAPTER_FILE, lambda file: file.write(data))
    replace_file(directory / CONFIG_FILE, lambda file: file.write(text))


def _glora_config(adapter: AdapterSpec) -> dict[str, Any]:
    layers = adapter.layers
    problems: list[str] = []
    for path, layer in layers.items():
        config = layer.config
        if config.A != config.B:
            problems.append(f"{path!r} has A={config.A} and B={config.B}, which must be one form")
        if config.D != config.E:
            problems.append(f"{path!r} has D={config.D} and E={config.E}, which must be one form")
        if config.product != "hadamard" and config.A not in ("none", "constant"):
            problems.append(f"{path!r} has product={config.product!r}, which must be 'hadamard'")
        if layer.config.create_bias or (layer.bias is False and any(config.forms[name] != "none" for name in "CDE")):
            problems.append(f"{path!r} has a bias that was created, which PEFT's layers cannot have")
    with_bias = [layer.config for layer in layers.values() if layer.bias is not False]
    shared: dict[str, Any] = {}
    for field, names, among in (
        ("config_A_B", "AB", [layer.config for layer in layers.values()]),
        ("config_C", "C", with_bias),
        ("config_D_E", "DE", with_bias),
    ):
        found = {config.forms[names[0]] for config in among}
        shared[field] = found.pop() if len(found) == 1 else "none"
        if found:
            problems.append(f"its layers differ in the form of {' and '.join(names)}, which must be one for all")
    ranks = {layer.config.rank for layer in layers.values() if "lora" in layer.config.forms.values()}
    if len(ranks) > 1:
        problems.append(f"its layers have ranks {sorted(ranks)}, which must be one for all")
    if "" in layers:
        problems.append("it is on the model itself, and PEFT adapts layers inside of a model")
    if problems:
        raise ValueError(
            f"PEFT's GLoRA has one form for A and B and one for D and E, in all layers alike; this adapter cannot be "
            f"written for it, and nothing was. Found: {'; '.join(problems[:5])}. Keep it with glora.save."
        )
    return {
        "peft_type": "GLORA",
        "r": max(ranks, default=8),
        **shared,
        # A regex: a list would be taken as suffixes, and reach other layers too.
        "target_modules": "|".join(re.escape(path) for path in layers),
        "modules_to_save": sorted(adapter.heads) or None,
        "bias": "none",
        "init_weights": True,
        "inference_mode": True,
        "base_model_name_or_path": None,
        "task_type": None,
        "revision": None,
    }


def _refuse_what_is_not_done(config: Mapping[str, Any], file: Path) -> None:
    problems = [f"{key}={value!r}" for key, value in config.items() if value and key not in _HARMLESS]
    problems = [text for text in problems if text not in ("bias='none'", "init_lora_weights=True")]
    problems = [text for text in problems if not _starts_plainly(text)]
    if problems:
        raise AdapterFileError(
            f"glora computes PEFT's {config['peft_type']} as its paper has it; {file} also asks for "
            f"{format_names(problems)}, which it does not do. Merge the adapter with PEFT, or train it without."
        )


def _starts_plainly(text: str) -> bool:
    return text.startswith("init_lora_weights=") and not any(start in text.lower() for start in _CHANGES_BASE)


def _is_inside(key: str, module: str) -> bool:
    """Whether a tensor is of a saved module, which PEFT names by the end of its path."""
    return re.match(rf"(.*\.)?{re.escape(module)}\.", key) is not None and not re.search(
        r"\.(lora|glora|hira|ia3)_", key
    )


_Layers = Mapping[str, Mapping[str, Tensor]]
_PARTS = re.compile(r"(?:(?P<path>.*)\.)?(?P<part>(?:lora|hira|glora|ia3)_.*)")


def _by_layer(keys: Iterable[str], tensors: Mapping[str, Tensor]) -> _Layers:
    """Layer's path to the adapter's own keys and tensors in it."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key in sorted(keys):
        match = _PARTS.fullmatch(key)
        if match is None:
            raise AdapterFileError(f"{key!r} belongs to no adapter's layer, and to no module of modules_to_save.")
        layers.setdefault(match["path"] or "", {})[match["part"]] = tensors[key]
    return layers


def _assemble(
    layers: _Layers, parse: Callable[[str, dict[str, Tensor]], tuple[LayerSpec, dict[str, Tensor]]]
) -> AdapterSpec:
    """A description of all layers; `parse` takes what it uses out of a layer's tensors, and nothing may be left."""
    records: dict[str, LayerSpec] = {}
    tensors: dict[str, Tensor] = {}
    for path, given in layers.items():
        rest = dict(given)
        records[path], found = parse(path, rest)
        if rest:
            raise ValueError(f"{path!r} has {format_names(rest)}, which glora has no path for")
        tensors |= {f"{path}.{key}" if path else key: tensor for key, tensor in found.items()}
    return AdapterSpec(records, {}, tensors)


def _read_glora(config: Mapping[str, Any], layers: _Layers) -> AdapterSpec:
    stated = {"A": "config_A_B", "B": "config_A_B", "C": "config_C", "D": "config_D_E", "E": "config_D_E"}

    def parse(path: str, given: dict[str, Tensor]) -> tuple[LayerSpec, dict[str, Tensor]]:
        forms: dict[str, Any] = {}
        found: dict[str, Tensor] = {}
        out_features = in_features = rank = None
        for name, field in stated.items():
            zeros = given.pop(f"glora_{name}.zeros", None)
            forms[name] = "none" if zeros is not None or config[field] == "none" else config[field]
            if zeros is not None and bool(zeros.count_nonzero()):
                raise ValueError(f"{path}.glora_{name}.zeros is not zero")
            if zeros is not None and name == "A":
                out_features, in_features = zeros.shape
            if forms[name] == "lora":
                left, right = (
                    found.setdefault(f"{name}.{ours}", given.pop(f"glora_{name}.{theirs}"))
                    for ours, theirs in (("left", "Xd"), ("right", "Xu"))
                )
                rank = left.shape[1]
                if name in "AB":
                    out_features, in_features = left.shape[0], right.shape[1]
            elif forms[name] != "none":
                found[f"{name}.value"] = given.pop(f"glora_{name}.X")
        bias = None
        if any(config[stated[name]] != "none" for name in "CDE"):
            bias = any(forms[name] != "none" for name in "CDE")
        return LayerSpec(GLoRAConfig(**forms, rank=rank or config["r"]), out_features, in_features, bias), found

    return _assemble(layers, parse)


def _read_lora(config: Mapping[str, Any], layers: _Layers) -> AdapterSpec:
    def parse(path: str, given: dict[str, Tensor]) -> tuple[LayerSpec, dict[str, Tensor]]:
        right, left = given.pop("lora_A.weight"), given.pop("lora_B.weight")
        rank = left.shape[1]
        if rank != _of_pattern(config.get("rank_pattern"), path, config["r"]):
            raise ValueError(f"{path!r} has rank {rank}, and the config says otherwise")
        alpha = _of_pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
        alpha = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
        found = {"B.left": left, "B.right": right}
        bias = given.pop("lora_B.bias", None)
        if bias is not None:
            found["E.value"] = bias.to(working_dtype(bias)) * (alpha / rank)
        forms: dict[str, Any] = {"E": "vector", "create_bias": True} if bias is not None else {}
        ours = _config(B="lora", **forms, rank=rank, alpha=float(alpha))
        return LayerSpec(ours, left.shape[0], right.shape[1]), found

    return _assemble(layers, parse)


def _read_hira(config: Mapping[str, Any], layers: _Layers) -> AdapterSpec:
    del config

    def parse(_path: str, given: dict[str, Tensor]) -> tuple[LayerSpec, dict[str, Tensor]]:
        right, left = given.pop("hira_A"), given.pop("hira_B")
        rank = left.shape[1]  # which scales nothing, and PEFT does not always hold itself to its rank_pattern
        layer = LayerSpec(GLoRAConfig.hira(rank=rank), left.shape[0], right.shape[1])
        return layer, {"A.left": left, "A.right": right}

    return _assemble(layers, parse)


def _read_ia3(config: Mapping[str, Any], layers: _Layers) -> AdapterSpec:
    feedforward = cast("str | list[str]", config.get("feedforward_modules") or [])

    def parse(path: str, given: dict[str, Tensor]) -> tuple[LayerSpec, dict[str, Tensor]]:
        scale = given.pop("ia3_l")
        change = scale.to(working_dtype(scale)) - 1
        if scale.ndim != 2 or 1 not in scale.shape:
            raise ValueError(f"{path}.ia3_l has shape {tuple(scale.shape)}, and is no vector of a linear layer")
        if isinstance(feedforward, str):
            scales_inputs = re.fullmatch(feedforward, path) is not None
        else:
            scales_inputs = any(path == entry or path.endswith(f".{entry}") for entry in feedforward)
        if scale.shape[0 if scales_inputs else 1] != 1:
            raise ValueError(f"{path}.ia3_l has shape {tuple(scale.shape)}, which feedforward_modules contradicts")
        if not scales_inputs:
            return LayerSpec(GLoRAConfig.ia3(), scale.shape[0], None), {"A.value": change, "D.value": change[:, 0]}
        ours = _config(A="vector", product="matmul")
        return LayerSpec(ours, None, scale.shape[1]), {"A.value": change}

    return _assemble(layers, parse)


def _config(**options: Any) -> GLoRAConfig:
    """A config with no paths but those given."""
    nothing: dict[str, Any] = dict.fromkeys("ABCDE", "none")
    return GLoRAConfig(**nothing | options)


def _of_pattern(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """A layer's entry in rank_pattern or alpha_pattern: the first key that its path ends in, as a regex."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default
