"""kohya's and LyCORIS's files, checked and read as an AdapterSpec for each model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from glora.files.container import parse_json, read_header
from glora.fingerprint import Fingerprint
from glora.interop.lycoris import methods
from glora.interop.lycoris.held import Held
from glora.interop.lycoris.methods import Read, Reader, ShapeError
from glora.interop.lycoris.names import flat, resolve
from glora.interop.patterns import of_pattern
from glora.interop.tensors import read_tensors
from glora.spec import AdapterFileError, AdapterSpec, LayerSpec, join
from glora.text import format_names, format_problems

# The tensor that tells a method, and its reader; in this order, since `diff_b` may stand beside others.
METHODS: dict[str, Reader] = {
    "lora_up.weight": methods.read_lora,
    "hada_w1_a": methods.read_loha,
    "lokr_w1": methods.read_lokr,
    "lokr_w1_a": methods.read_lokr,
    "a1.weight": methods.read_glora,
    "on_input": methods.read_ia3,
    "w_norm": methods.read_norm,
    "diff": methods.read_full,
    "diff_b": methods.read_full,
}
_REASONS = {
    **dict.fromkeys(("oft_blocks", "oft_diag", "rescale"), "the formula has no place for a rotation of W0"),
    "lambda_layer": "its rank depends on the step of the diffusion",
    "set_weight": "it is a whole weight, and no change of one",
}
# Other spellings: diffusers', and older ones of its.
_SPELLINGS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
}
_PARTS = (
    *("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "dora_scale", "diff", "diff_b", "set_weight"),
    "lora_magnitude_vector",
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "w_norm", "b_norm", "on_input"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2"),
    *("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight", "oft_blocks", "oft_diag", "rescale"),
    *("q_layer.weight", "p_layer.weight", "lambda_layer"),
)
_KEY = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, (*_SPELLINGS, *_PARTS)))})")
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_\w+)_lora\.(down|up)\.weight")  # diffusers' oldest


def read_lycoris(
    file: Path, models: Mapping[str | None, Mapping[str, Held]], *, rs_lora: bool = False
) -> dict[str, AdapterSpec]:
    """The adapters in a file of kohya's or LyCORIS's.

    Args:
        file: the file.
        models: prefix of the names to the modules of a model by path; None is the one prefix that all names have.
        rs_lora: whether its GLoRA was trained with `rs_lora`.

    Returns:
        Prefix to adapter.

    Raises:
        AdapterFileError: it is damaged, of another method, or does not fit the models.
    """
    read, fingerprints = read_tensors(file)
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read.items():
        name, part = _split(key)
        parts = by_name.setdefault(name, {})
        if part in parts:
            raise AdapterFileError(f"{file} has {part!r} of {name!r} twice, in two spellings.")
        parts[part] = tensor
    if not by_name:
        raise AdapterFileError(f"An adapter has tensors; {file} has none.")
    _refuse_methods(by_name, file)
    described = _described(file)
    found = resolve(by_name, models, file)
    problems: list[str] = []
    adapters: dict[str, AdapterSpec] = {}
    for prefix, modules in found.items():
        layers: dict[str, LayerSpec] = {}
        heads: dict[str, tuple[str, ...]] = {}
        tensors: dict[str, Tensor] = {}
        for name, held in modules.items():
            layer = _read_layer(held, dict(by_name[name]), rs_lora, partial(_alpha, described, prefix))
            if isinstance(layer, str):
                problems.append(f"{name!r} ({held.path}): {layer}")
            elif held.path in layers or held.path in heads:
                problems.append(f"{name!r}: another name in the file is of {held.path!r} too")
            else:
                tensors |= {join(held.path, key): tensor for key, tensor in layer.tensors.items()}
                if layer.layer is None:
                    heads[held.path] = tuple(layer.tensors)
                else:
                    layers[held.path] = layer.layer
        adapters[prefix] = AdapterSpec(layers, heads, tensors, base=_own(fingerprints, prefix))
    if problems:
        raise AdapterFileError(
            f"Each layer in a file must be one of the model's, of its shape and of a method that the formula holds; "
            f"{file} is not, and nothing was changed. Found: {format_problems(problems)}."
        )
    return adapters


def _split(key: str) -> tuple[str, str]:
    """A key's layer, with underscores for dots, and the tensor in it, as LyCORIS spells it."""
    processor = _PROCESSOR.fullmatch(key)
    if processor is not None:
        path, name, which = processor.groups()
        return flat(f"{path}.{name}.0" if name == "to_out" else f"{path}.{name}"), f"lora_{which}.weight"
    match = _KEY.fullmatch(key)
    if match is not None:
        return flat(match[1]), _SPELLINGS.get(match[2], match[2])
    name, _, part = key.partition(".")
    return name, part


def _refuse_methods(by_name: Mapping[str, Mapping[str, Tensor]], file: Path) -> None:
    """Raise where layers are of methods that the formula does not hold, with the reason."""
    for name, parts in by_name.items():
        for part in parts:
            if part in _REASONS:
                raise AdapterFileError(
                    f"The formula W0 + W0 * A + B must hold an adapter; {file} has {part!r} of {name!r}, and "
                    f"{_REASONS[part]}. Serve it with the library that wrote it, or merge it into the base model there."
                )


def _read_layer(
    held: Held, parts: dict[str, Tensor], rs_lora: bool, alpha_of: Callable[[str, int], float | None]
) -> Read | str:
    """A layer, or what is wrong with it."""
    for part, tensor in parts.items():
        if not tensor.is_floating_point() and part not in ("alpha", "on_input"):
            return f"{part} is {tensor.dtype} where a floating dtype should be"
    if "on_input" in parts and "weight" not in parts:
        return "'on_input' of IA3 without 'weight'"
    reader = next((reader for part, reader in METHODS.items() if part in parts), None)
    if reader is None:
        return f"of no known method, with the tensors {format_names(parts)}"
    if held.matrix is None and reader not in (methods.read_norm, methods.read_full):
        return f"of a wrong kind: the model has a weight of {held.shape} there, which is no matrix that can be adapted"
    try:
        alpha = alpha_of(held.path, len(parts["lora_down.weight"])) if "lora_down.weight" in parts else None
        if alpha is not None:
            parts.setdefault("alpha", torch.tensor(alpha))
        with torch.no_grad():
            read = reader(held, parts, rs_lora)
    except ShapeError as error:
        return f"of a wrong shape: {error}"
    except KeyError as error:
        return f"without {error}, which its method has"
    except (
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        IndexError,
        re.error,
    ) as error:  # tensors of any axes
        return str(error)
    return f"with {format_names(parts)}, which its method has not" if parts else read


def _described(file: Path) -> dict[str, Any]:
    """The fields of PEFT's configs that diffusers writes into a file's metadata, as `unet.lora_alpha`."""
    text = read_header(file).metadata.get("lora_adapter_metadata") if file.suffix == ".safetensors" else None
    fields = parse_json(text or "{}", file)
    if not isinstance(fields, dict):
        raise AdapterFileError(f"lora_adapter_metadata of {file} must be a mapping; found {text!r:.40}.")
    return cast("dict[str, Any]", fields)


def _alpha(described: Mapping[str, Any], prefix: str, path: str, rank: int) -> float | None:
    """The alpha of a layer that diffusers describes, for alpha / rank."""
    alpha = described.get(f"{prefix}.lora_alpha")
    if alpha is None:
        return None
    own = of_pattern(described.get(f"{prefix}.alpha_pattern"), path, alpha)
    return float(own) * (math.sqrt(rank) if described.get(f"{prefix}.use_rslora") else 1)


def _own(fingerprints: Mapping[str, Fingerprint], prefix: str) -> dict[str, Fingerprint]:
    """The fingerprints of a prefix's model: `save_lycoris` puts the prefix before those of several."""
    if not any("/" in key for key in fingerprints):
        return dict(fingerprints)
    return {
        key.removeprefix(f"{prefix}/"): known for key, known in fingerprints.items() if key.startswith(f"{prefix}/")
    }
