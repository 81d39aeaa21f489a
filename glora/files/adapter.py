"""Adapter files: one safetensors file that holds everything, and a JSON copy of its description for people."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from glora.config import FORMS, GLoRAConfig
from glora.engines.fill import fill_spec, is_filled_by_load
from glora.engines.fsdp import save_together
from glora.files.card import card, replaced_cards
from glora.files.container import (
    ADAPTER_FILE,
    CONFIG_FILE,
    PEFT_CONFIG_FILE,
    adapter_file,
    bytes_of,
    parse_fingerprints,
    parse_json,
    plain_tensors,
    read_safetensors,
    replace_files,
    serialize,
)
from glora.matrices import Matrix, parse_matrix
from glora.model.attach import attach_spec
from glora.model.huggingface import hub_name
from glora.model.refill import refill
from glora.model.state import describe
from glora.model.statistics import warn_of_changed_buffers
from glora.model.walk import Model, owners
from glora.spec import AdapterFileError, AdapterSpec, LayerSpec, mismatches
from glora.text import format_problems
from glora.undo import uncollected
from glora.version import __version__

FORMAT_VERSION = 1
_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".json")

# Note [Adapter file]
# A file can be replaced atomically, a folder cannot: so one file holds everything, tensors and description, and the
# JSON beside it is a copy that nothing depends on. The file's metadata has three entries: "format" (a convention of
# safetensors), "glora" (the description, JSON) and "sha256", of the description and of each tensor's name, dtype, shape
# and bytes. Reading checks the container (safetensors), then the sum, then every field of the description, then that
# the tensors are those which the description asks for, and only then the model. Older files of this format have no
# "base" and no "outside" (fingerprints of frozen tensors), and no "ties" (Note [Tied heads]).


def save(model: nn.Module, directory: str | os.PathLike[str], name: str | None = None) -> None:
    """Write one adapter into a folder: `adapter_model.safetensors`; `glora_config.json` and `README.md` are for people.

    The first holds the adapter's tensors, heads included, and in its metadata everything that attaching them needs: the
    forms, rank, alpha, product and base shape of each layer, a fingerprint of each frozen tensor, by which `load`
    recognises the base, the version of the format, and a SHA-256 sum of it all. It is written under a temporary name,
    flushed to the disk and renamed: killed at any moment, the folder has the old adapter or the new one.
    `glora_config.json` is a copy of the description; nothing depends on it. `README.md` is a model card, which
    hubs show: base, layers, forms, parameters, how to load it. A `README.md` that a person wrote stays as it is.

    An `adapter_config.json` in the folder, PEFT's or an older glora's, describes the adapter that is replaced, and is
    removed. PEFT then reports that there is none of its own; `glora.interop.save_peft` writes one.

    Args:
        model: the model, or a wrapper of it.
        directory: the folder; made if it is not there.
        name: the adapter; None for the only one.

    Raises:
        KeyError: no adapter of that name.
        ValueError: no `name`, and not exactly one adapter; tensors on the meta device; more layers than a file can
            describe. Also the two arguments in the wrong order, and a `directory` that is a file.
        ImportError: safetensors is not installed (the extra `glora[files]`).
        RuntimeError: tensors that FullyShardedDataParallel has flattened; see its `summon_full_params`.

    A model under `fully_shard` is saved by all ranks together. Only the adapter's tensors are gathered, one at a time.
    Rank 0 writes; the others return once the file is in place, or raise what rank 0 raised.

    Example:
        >>> import copy, tempfile, torch, glora
        >>> base = torch.nn.Linear(4, 2)
        >>> layer = glora.apply(copy.deepcopy(base), config=glora.GLoRAConfig(init="random"))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     glora.save(layer, directory)
        ...     other = glora.load(base, directory, strict=True)
        >>> torch.equal(glora.state_dict(other)["B.left"], glora.state_dict(layer)["B.left"])
        True
    """
    _check_arguments("save", model, directory)
    with uncollected():
        adapter, walk = describe(model, name), owners(model)
        base = hub_name(walk)
        warn_of_changed_buffers(walk, stacklevel=2)
        save_together(
            adapter.tensors,
            lambda gathered: write(Path(directory), dataclasses.replace(adapter, tensors=gathered), base),
        )


def load(
    model: Model,
    directory: str | os.PathLike[str],
    name: str = "default",
    *,
    trainable: bool = True,
    strict: bool = False,
    replace: bool = False,
    check: bool = True,
) -> Model:
    """Attach an adapter from a folder that `glora.save` wrote, in one call; no config is needed.

    Everything is checked before the model changes: the file's sum, its description, the key, shape and dtype of every
    tensor, and that the model has each layer in the shape that was adapted. Nothing is unpickled. The rest of the
    model is frozen, as by `glora.apply`, and the adapter is the only active one.

    A model under `fully_shard` takes no new adapter. Attach it before, under this name, on the meta device say; then
    every rank calls `load` to fill it (Note [Load after sharding]).

    Args:
        model: the model. Tensors go to each layer's device; for layers on the meta device they stay on the CPU until
            the model is moved.
        directory: the folder, or its `adapter_model.safetensors`.
        name: the adapter's name in the model.
        trainable: whether its tensors ask for gradients; False for inference.
        strict: whether a base other than the one that the adapter was trained on is an error, or a warning. The file
            has a fingerprint of each frozen tensor of the adapted layers, and of the last rows of every other parameter
            (a head that was new, words that were added), which rounding to half precision does not change, nor a
            difference of less than 1 to 2% of the tensor's norm; what is on the meta device, or sharded, is not
            compared.
        replace: put it in the place of the adapter of this name, which must be there (hot swap). Where layers, forms
            and heads are the same, and no rank is higher, its numbers are written into the Parameters that are there:
            no new graph under torch.compile, whatever the scales, and optimizers go on. A lower rank is padded with
            zeros, and saved again as the file has it. Any other adapter is dropped, and attached anew.
        check: whether the base is compared; False saves reading it.

    Returns:
        The model.

    Raises:
        glora.AdapterFileError: a file that is damaged, of another library, or does not fit the model; with
            `strict=True`, another base. The model is as it was.
        FileNotFoundError: no file.
        ValueError: a name that is taken, without `replace`; `strict` without `check`.
        KeyError: with `replace`, no adapter of that name.
        RuntimeError: inside `glora.merged` or `glora.route`.

    Warns:
        UserWarning: frozen tensors, by name, that differ from those that the adapter was trained on (most often a head
            that was random then); a `glora_config.json` that differs from `adapter_model.safetensors`, which counts.

    Example:
        >>> import tempfile, torch, glora
        >>> layer = glora.apply(torch.nn.Linear(4, 2))
        >>> held = next(glora.parameters(layer))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     glora.save(layer, directory)
        ...     layer = glora.load(layer, directory, replace=True)
        >>> next(glora.parameters(layer)) is held
        True
    """
    _check_arguments("load", model, directory)
    if strict and not check:
        raise ValueError("strict=True is about what check=False leaves out: the base. Pass one of them.")
    file = adapter_file(directory)
    with uncollected():
        spec = read(file)
        if not check:
            spec = dataclasses.replace(spec, base={}, outside={})
        if is_filled_by_load(model, name):
            return fill_spec(model, spec, file, name, trainable=trainable)
        if replace:
            return refill(model, spec, file, name, trainable=trainable, strict=strict)
        return attach_spec(model, spec, file, name=name, trainable=trainable, strict=strict)


def _check_arguments(call: str, model: object, directory: object) -> None:
    """Raise ValueError for arguments that are exchanged, or a folder that has the name of a file."""
    if not isinstance(model, nn.Module) or not isinstance(directory, (str, os.PathLike)):
        raise ValueError(
            f"glora.{call} takes a model and then a folder; found a {type(model).__name__} and a "
            f"{type(directory).__name__}."
        )
    path = Path(directory)  # pyright: ignore[reportUnknownArgumentType]
    if call == "save" and (path.is_file() or (path.suffix in _FILES and not path.is_dir())):
        raise ValueError(
            f"glora.save writes a folder, with {ADAPTER_FILE} in it; found {str(path)!r}, the name of a file. Pass "
            f"{str(path.with_suffix(''))!r}, say."
        )


def write(directory: Path, adapter: AdapterSpec, base: str | None = None) -> None:
    """Write a described adapter into a folder (Notes [Adapter file], [Model card]); `base` is its base's name."""
    fields, tensors = to_json(adapter), plain_tensors(adapter.tensors)
    text, copy = json.dumps(fields, sort_keys=True), _for_people(fields)
    data = serialize(tensors, {"glora": text, "sha256": digest(text, tensors)})
    cards = {file: card(adapter, base).encode() for file in replaced_cards(directory)}
    contents = {directory / ADAPTER_FILE: data, **cards, directory / CONFIG_FILE: copy.encode()}
    replace_files(contents, obsolete=[directory / PEFT_CONFIG_FILE, *cards])


def _for_people(fields: Mapping[str, Any]) -> str:
    """JSON with a line for each entry of a table; Python's own indentation takes ten times as long."""
    encode, entries = json.JSONEncoder(sort_keys=True).encode, list[str]()
    for name, value in sorted(fields.items()):
        text = encode(value)
        if isinstance(value, dict) and value:
            lines = [f"    {encode(key)}: {encode(value[key])}" for key in sorted(cast("dict[str, Any]", value))]
            text = "{\n" + ",\n".join(lines) + "\n  }"
        entries.append(f"  {encode(name)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def read(file: Path) -> AdapterSpec:
    """Read and check an adapter's file (Note [Adapter file]).

    Raises:
        AdapterFileError: it is damaged, or of another library.
    """
    tensors, metadata, header = read_safetensors(file)
    if "glora" not in metadata:
        remedy = "If another library wrote it, see glora.interop (load_peft, load_lycoris)."
        if (file.parent / PEFT_CONFIG_FILE).exists():
            remedy = f"The folder looks like PEFT's: glora.interop.load_peft(model, {str(file.parent)!r})."
        raise AdapterFileError(
            f"An adapter of glora has its description in the file's metadata; {file} has none. {remedy}"
        )
    text = metadata["glora"]
    if set(metadata) != {"format", "glora", "sha256"} or metadata["format"] != "pt":
        raise AdapterFileError(f"The metadata of {file} are not what glora writes; the file is damaged.")
    # safetensors pads with spaces. Parsers skip other white space too, and the sum does not cover the padding.
    if any(byte in header for byte in b"\t\n\r"):
        raise AdapterFileError(f"The header of {file} has white space that safetensors never writes; it is damaged.")
    if digest(text, tensors) != metadata["sha256"]:
        raise AdapterFileError(
            f"The contents of an adapter file must have the SHA-256 sum that was saved with them; those of {file} have "
            f"another, so that it is damaged. Copy it again from its source."
        )
    adapter = parse(file, parse_json(text, file), tensors)
    _compare_copy(file, text)
    return adapter


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of a description and of each tensor's name, dtype, shape and bytes."""
    total = hashlib.sha256(text.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        total.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(bytes_of(tensor))
    return total.hexdigest()


def to_json(adapter: AdapterSpec) -> dict[str, Any]:
    """The description of an adapter, as JSON has it."""
    layers: dict[str, Any] = {}
    for path, layer in adapter.layers.items():
        fields = {field: getattr(layer.config, field) for field in GLoRAConfig.__dataclass_fields__}
        forms = {name: fields.pop(name) for name in FORMS}
        if not layer.config.is_balanced:  # as for `matrix` below
            del fields["balance"]
        layers[path] = {
            "forms": {name: form for name, form in forms.items() if form != "none"},
            **fields,
            "out_features": layer.out_features,
            "in_features": layer.in_features,
            "bias": layer.bias,
        }
        if not layer.is_linear:  # older versions refuse files with these two fields, and read all others
            matrix = cast("Matrix", layer.matrix)
            layers[path]["matrix"] = {"weight": matrix.weight, "bias": matrix.bias, "pattern": matrix.pattern}
            layers[path]["batch"] = list(layer.batch or ())
    heads = {path: sorted(names) for path, names in adapter.heads.items()}
    fields = {"format_version": FORMAT_VERSION, "glora_version": __version__, "layers": layers, "heads": heads}
    optional = {"base": {key: list(known) for key, known in adapter.base.items()}, "ties": dict(adapter.ties)}
    optional |= {"outside": {key: list(known) for key, known in adapter.outside.items()}}
    optional |= {"statistics": {path: sorted(names) for path, names in adapter.statistics.items()}}
    return fields | {key: value for key, value in optional.items() if value}


def parse(file: object, raw: Any, tensors: Mapping[str, Tensor]) -> AdapterSpec:
    """The adapter of a description and its tensors, of which `file` is the source; every field is checked.

    Raises:
        AdapterFileError: the description cannot be understood, or is not that of the tensors.
    """
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
        base = parse_fingerprints(raw.get("base", {}))
        outside = parse_fingerprints(raw.get("outside", {}))
        statistics = {path: tuple(map(str, names)) for path, names in raw.get("statistics", {}).items()}
        ties = {str(key): str(owner) for key, owner in raw.get("ties", {}).items()}
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        raise AdapterFileError(f"The description in {file} cannot be understood: {error!r}.") from error
    adapter = AdapterSpec(layers, heads, tensors, ties, base, outside, statistics)
    problems = list(mismatches(tensors, adapter.wanted()))
    if problems:
        raise AdapterFileError(f"The tensors of {file} are not those of its description: {format_problems(problems)}.")
    return adapter


def _parse_layer(fields: dict[str, Any]) -> LayerSpec:
    fields = dict(fields)
    shape, bias = (fields.pop("out_features"), fields.pop("in_features")), fields.pop("bias")
    matrix, batch = fields.pop("matrix", None), fields.pop("batch", [])
    sizes = [size for size in (*shape, *batch) if size is not None]
    if not all(type(size) is int and size > 0 for size in sizes) or None in batch or (batch and matrix is None):
        raise ValueError(f"a weight of shape {shape} in a batch {batch}")
    if bias is not None and type(bias) is not bool:
        raise ValueError(f"a bias {bias!r}")
    matrix = None if matrix is None else parse_matrix(**matrix)
    forms = {**dict.fromkeys(FORMS, "none"), **fields.pop("forms")}
    fields.setdefault("balance", "none")  # older files have none
    return LayerSpec(GLoRAConfig(**forms, **fields), *shape, bias, matrix, tuple(batch))


def _compare_copy(file: Path, text: str) -> None:
    """Warn where the copy of the description, under today's name or the earlier one, differs from the file's."""
    copy = next((copy for name in (CONFIG_FILE, PEFT_CONFIG_FILE) if (copy := file.with_name(name)).exists()), None)
    try:
        same = copy is None or parse_json(copy.read_bytes(), copy) == json.loads(text)
    except (AdapterFileError, OSError):
        same = False
    if not same:
        warnings.warn(
            f"{copy} does not say what {file.name} says, which is what counts. It may have been edited, or belong to "
            f"another adapter; saving again renews it.",
            UserWarning,
            stacklevel=4,
        )
