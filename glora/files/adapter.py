"""Adapter files: one safetensors file that holds the whole truth, and a JSON copy of its description for readers."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from glora.config import FORMS, GLoRAConfig
from glora.engines.fill import fill_spec, is_filled_by_load
from glora.engines.fsdp import save_together
from glora.files.base import parse_base
from glora.files.container import (
    ADAPTER_FILE,
    CONFIG_FILE,
    PEFT_CONFIG_FILE,
    adapter_file,
    parse_json,
    plain_tensors,
    read_safetensors,
    replace_files,
    serialize,
)
from glora.matrices import Matrix, parse_matrix
from glora.model.attach import attach_spec
from glora.model.state import describe
from glora.model.walk import Model
from glora.spec import AdapterFileError, AdapterSpec, LayerSpec, mismatches
from glora.text import format_problems
from glora.version import __version__

FORMAT_VERSION = 1

# Note [Adapter file]
# A folder cannot be replaced atomically, a file can: so one file holds everything, tensors and description, and the
# JSON beside it is a copy that nothing depends on. The file's metadata has three entries: "format" (safetensors' own
# habit), "glora" (the description, JSON) and "sha256", of the description and of each tensor's name, dtype, shape and
# bytes. Reading checks, in this order: the container (safetensors), the sum, the description's every field, and that
# its layers account for every tensor with the right shape; only then is a model looked at. "base" in the description,
# the fingerprints of frozen tensors, and "ties" (Note [Tied heads]) are not in earlier files of this format.


def save(model: nn.Module, directory: str | os.PathLike[str], name: str | None = None) -> None:
    """Write one adapter into a folder: `adapter_model.safetensors`, and `glora_config.json` for readers.

    The first holds the adapter's tensors, heads included, and in its metadata all that is needed to attach them again:
    each layer's forms, rank, alpha, product, base shape and a fingerprint of its frozen tensors, by which `load` knows
    the base again, the format's version and a SHA-256 sum of it all. It is written beside, flushed to the disk and put
    in place in one step: killed at any moment, the folder has the old adapter or the new one. `glora_config.json` is a
    copy of the description, for people; nothing depends on it.

    An `adapter_config.json` in the folder, PEFT's or an earlier glora's, describes the adapter that is replaced, and is
    removed. PEFT and transformers then say that there is no adapter of theirs; `glora.interop.save_peft` writes one.

    Args:
        model: the model, or a wrapper of it.
        directory: the folder; made if it is not there.
        name: the adapter; None for the only one.

    Raises:
        KeyError: no adapter of that name.
        ValueError: None, and not exactly one adapter; tensors on the meta device; more layers than a file describes.
        ImportError: safetensors is not installed (the extra `glora[files]`).
        RuntimeError: tensors that FullyShardedDataParallel has flattened; see its `summon_full_params`.

    A model under `fully_shard` is saved by all ranks together: the adapter's tensors alone are gathered, one by one,
    the first rank writes, and the others leave when the file is there, or raise what it raised.

    Example:
        >>> import copy, tempfile, torch, glora
        >>> base = torch.nn.Linear(4, 2)
        >>> layer = glora.apply(copy.deepcopy(base), config=glora.GLoRAConfig(init="random"))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     glora.save(layer, directory)
        ...     other = glora.load(base, directory, strict=True)
        >>> torch.equal(glora.state_dict(other)["A.left"], glora.state_dict(layer)["A.left"])
        True
    """
    adapter = describe(model, name)
    save_together(adapter.tensors, lambda whole: write(Path(directory), replace(adapter, tensors=whole)))


def load(
    model: Model,
    directory: str | os.PathLike[str],
    name: str = "default",
    *,
    trainable: bool = True,
    strict: bool = False,
) -> Model:
    """Attach an adapter from a folder that `glora.save` wrote, in one call; no config is needed.

    Everything is checked before the model changes: the file's sum, its description, every tensor's key, shape and
    dtype, and that the model has each layer with the shape that was adapted. Nothing is unpickled. The rest of the
    model is frozen, as by `glora.apply`, and the adapter is the only active one.

    A model under `fully_shard` takes no new adapter: it has the adapter already, by this name (attached on the meta
    device, say), and every rank calls `load` to fill it (Note [Load after sharding]).

    Args:
        model: the model. Tensors go to each layer's device; on the meta device, whose layers have no memory yet, they
            stay on the CPU until the model is moved.
        directory: the folder, or its `adapter_model.safetensors`.
        name: the adapter's name in the model.
        trainable: whether its tensors ask for gradients; False for one that only serves.
        strict: whether a base other than the one that the adapter was trained beside is an error, or a warning. The
            file has a fingerprint of each adapted layer's frozen tensors, which rounding to half precision does not
            change; layers without memory, or sharded, are not compared.

    Returns:
        The model.

    Raises:
        glora.AdapterFileError: a file that is damaged, foreign, or does not fit the model, or with `strict=True`
            belongs to another base; the model is as it was.
        FileNotFoundError: no file.
        ValueError: a name that is taken.
        RuntimeError: inside `glora.merged` or `glora.route`.

    Warns:
        UserWarning: layers, by name, whose frozen tensors are not those that the adapter was trained beside (a head
            that was random then, above all); `glora_config.json` does not say what `adapter_model.safetensors` says,
            which counts.
    """
    file = adapter_file(directory)
    spec = read(file)
    if is_filled_by_load(model, name):
        return fill_spec(model, spec, file, name, trainable=trainable)
    return attach_spec(model, spec, file, name=name, trainable=trainable, strict=strict)


def write(directory: Path, adapter: AdapterSpec) -> None:
    """Write a described adapter into a folder (Note [Adapter file])."""
    meta = [key for key, tensor in adapter.tensors.items() if tensor.is_meta]
    if meta:
        raise ValueError(f"Only tensors with memory can be saved; {meta[0]!r} is on the meta device.")
    fields, tensors = _to_json(adapter), plain_tensors(adapter.tensors)
    text, copy = json.dumps(fields, sort_keys=True), json.dumps(fields, indent=2, sort_keys=True) + "\n"
    data = serialize(tensors, {"glora": text, "sha256": digest(text, tensors)})
    contents = {directory / ADAPTER_FILE: data, directory / CONFIG_FILE: copy.encode()}
    replace_files(contents, obsolete=[directory / PEFT_CONFIG_FILE])


def read(file: Path) -> AdapterSpec:
    """Read and check an adapter's file (Note [Adapter file]).

    Raises:
        AdapterFileError: it is damaged or foreign.
    """
    tensors, metadata, header = read_safetensors(file)
    if "glora" not in metadata:
        raise AdapterFileError(
            f"An adapter of glora has its description in the file's metadata; {file} has none. If another library "
            f"wrote it, see glora.interop (load_peft, load_lycoris)."
        )
    text = metadata["glora"]
    if set(metadata) != {"format", "glora", "sha256"} or metadata["format"] != "pt":
        raise AdapterFileError(f"The metadata of {file} are not what glora writes; the file is damaged.")
    # Padding is spaces: other white space there means nothing to a parser, and is damage that the sum does not cover.
    if any(byte in header for byte in b"\t\n\r"):
        raise AdapterFileError(f"The header of {file} has white space that safetensors never writes; it is damaged.")
    if digest(text, tensors) != metadata["sha256"]:
        raise AdapterFileError(
            f"The contents of {file} do not have the SHA-256 sum that was saved with them; the file is damaged. Get it "
            f"again from where it came from."
        )
    adapter = _parse(file, parse_json(text, file), tensors)
    _compare_copy(file, text)
    return adapter


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of a description and of each tensor's name, dtype, shape and bytes."""
    total = hashlib.sha256(text.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        total.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(memoryview(cast("Any", tensor.reshape(-1).view(torch.uint8).numpy())))
    return total.hexdigest()


def _to_json(adapter: AdapterSpec) -> dict[str, Any]:
    """The description of an adapter, as JSON has it."""
    layers: dict[str, Any] = {}
    for path, layer in adapter.layers.items():
        fields = asdict(layer.config)
        forms = {name: fields.pop(name) for name in FORMS}
        layers[path] = {
            "forms": {name: form for name, form in forms.items() if form != "none"},
            **fields,
            "out_features": layer.out_features,
            "in_features": layer.in_features,
            "bias": layer.bias,
            # Said only where it is not as in a linear layer: a reader of before then refuses what it does not know.
            **({} if layer.is_linear else {"matrix": _matrix_to_json(layer), "batch": list(layer.batch or ())}),
        }
    heads = {path: sorted(names) for path, names in adapter.heads.items()}
    fields = {"format_version": FORMAT_VERSION, "glora_version": __version__, "layers": layers, "heads": heads}
    optional = {"base": {key: list(known) for key, known in adapter.base.items()}, "ties": dict(adapter.ties)}
    return fields | {key: value for key, value in optional.items() if value}


def _matrix_to_json(layer: LayerSpec) -> dict[str, Any]:
    matrix = cast("Matrix", layer.matrix)
    return {"weight": matrix.weight, "bias": matrix.bias, "pattern": matrix.pattern}


def _parse(file: Path, raw: Any, tensors: Mapping[str, Tensor]) -> AdapterSpec:
    """The adapter that a description and tensors make, every field of it checked."""
    raw = cast("dict[str, Any]", raw if isinstance(raw, dict) else {})
    if raw.get("format_version") != FORMAT_VERSION:
        raise AdapterFileError(
            f"This glora reads adapter files of format {FORMAT_VERSION}; {file} has format "
            f"{raw.get('format_version')!r}. Use the glora that wrote it, or a newer one."
        )
    try:
        by_path, by_head = cast("dict[str, dict[str, Any]]", raw["layers"]), cast("dict[str, Any]", raw["heads"])
        layers = {path: _parse_layer(fields) for path, fields in by_path.items()}
        heads = {path: tuple(map(str, names)) for path, names in by_head.items()}
        base, tied = parse_base(raw.get("base", {})), cast("dict[str, Any]", raw.get("ties", {}))
        ties = {str(key): str(owner) for key, owner in tied.items()}
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        raise AdapterFileError(f"The description in {file} cannot be understood: {error!r}.") from error
    adapter = AdapterSpec(layers, heads, tensors, ties, base)
    problems = list(mismatches(tensors, adapter.wanted()))
    if problems:
        raise AdapterFileError(f"The tensors of {file} are not those of its description: {format_problems(problems)}.")
    return adapter


def _parse_layer(fields: dict[str, Any]) -> LayerSpec:
    fields = dict(fields)
    shape = fields.pop("out_features"), fields.pop("in_features")
    bias = fields.pop("bias")
    known = [size for size in shape if size is not None]
    if not all(type(size) is int and size > 0 for size in known) or not (bias is None or type(bias) is bool):
        raise ValueError(f"sizes {shape} and bias {bias!r}")
    matrix, batch = fields.pop("matrix", None), fields.pop("batch", [])
    if not all(type(size) is int and size > 0 for size in batch) or (batch and matrix is None):
        raise ValueError(f"a batch {batch} of matrices")
    matrix = None if matrix is None else parse_matrix(**matrix)
    forms = {name: fields["forms"].get(name, "none") for name in FORMS}
    if not set(fields.pop("forms")) <= set(FORMS):
        raise ValueError("paths other than A to E")
    return LayerSpec(GLoRAConfig(**forms, **fields), *shape, bias, matrix, tuple(batch))


def _compare_copy(file: Path, text: str) -> None:
    """Warn where the readers' copy, under today's name or the earlier one, says something else than the file."""
    copy = next((copy for name in (CONFIG_FILE, PEFT_CONFIG_FILE) if (copy := file.with_name(name)).exists()), None)
    try:
        same = copy is None or parse_json(copy.read_bytes(), copy) == json.loads(text)
    except (AdapterFileError, OSError):
        same = False
    if not same:
        warnings.warn(
            f"{copy} does not say what {file.name} beside it says, which is what counts. It may have been edited, or "
            f"belong to another adapter; saving again renews it.",
            UserWarning,
            stacklevel=4,
        )
