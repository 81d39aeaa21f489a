"""Adapter files: one safetensors file that holds the whole truth, and a JSON copy of its description for readers."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import torch
from torch import Tensor, nn

from glora.config import FORMS, GLoRAConfig
from glora.record import AdapterFileError, AdapterRecord, LayerRecord, attach_record, check_tensors, record
from glora.tree import join

Model = TypeVar("Model", bound=nn.Module)

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = 1

# Note [Adapter file]
# A folder cannot be replaced atomically, a file can: so one file holds everything, tensors and description, and the
# JSON beside it is a copy that nothing depends on. The file's metadata has three entries: "format" (safetensors' own
# habit), "glora" (the description, JSON) and "sha256", of the description and of each tensor's name, dtype, shape and
# bytes. Reading checks, in this order: the container (safetensors), the sum, the description's every field, and that
# its layers account for every tensor with the right shape; only then is a model looked at.

_MOST_TEXT = 2**24  # bytes of description: a million layers would have less


def save(model: nn.Module, directory: str | os.PathLike[str], name: str | None = None) -> None:
    """Write one adapter into a folder: `adapter_model.safetensors`, and `adapter_config.json` for readers.

    The file holds the adapter's tensors, heads included, and in its metadata all that is needed to attach them again:
    each layer's forms, rank, alpha, product and base shape, the format's version and a SHA-256 sum of it all. It is
    written beside, flushed to the disk and put in place in one step: killed at any moment, the folder has the old
    adapter or the new one.

    Args:
        model: the model, or a wrapper of it.
        directory: the folder; made if it is not there.
        name: the adapter; None for the only one.

    Raises:
        KeyError: no adapter of that name.
        ValueError: None, and not exactly one adapter; tensors on the meta device.
        ImportError: safetensors is not installed (the extra `glora[files]`).

    Example:
        >>> import tempfile, torch, glora
        >>> layer = glora.apply(torch.nn.Linear(4, 2), config=glora.GLoRAConfig(init="random"))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     glora.save(layer, directory)
        ...     other = glora.load(torch.nn.Linear(4, 2), directory)
        >>> torch.equal(glora.state_dict(other)["A.left"], glora.state_dict(layer)["A.left"])
        True
    """
    write(Path(directory), record(model, name))


def load(model: Model, directory: str | os.PathLike[str], name: str = "default", *, trainable: bool = True) -> Model:
    """Attach an adapter from a folder that `glora.save` wrote, in one call; no config is needed.

    Everything is checked before the model changes: the file's sum, its description, every tensor's key, shape and
    dtype, and that the model has each layer with the shape that was adapted. Nothing is unpickled. The rest of the
    model is frozen, as by `glora.apply`, and the adapter is the only active one.

    Args:
        model: the model. Tensors go to each layer's device; on the meta device, whose layers have no memory yet, they
            stay on the CPU until the model is moved.
        directory: the folder, or the file in it.
        name: the adapter's name in the model.
        trainable: whether its tensors ask for gradients; False for one that only serves.

    Returns:
        The model.

    Raises:
        glora.AdapterFileError: a file that is damaged, foreign, or does not fit the model; the model is as it was.
        FileNotFoundError: no file.
        ValueError: a name that is taken.
        RuntimeError: inside `glora.merged` or `glora.route`.

    Warns:
        UserWarning: `adapter_config.json` does not say what the file says, which counts.
    """
    file = adapter_file(directory)
    return attach_record(model, read(file), file, name=name, trainable=trainable)


def adapter_file(directory: str | os.PathLike[str]) -> Path:
    """The adapter's file in a folder, or the file itself."""
    path = Path(directory)
    if path.is_dir():
        path = path / ADAPTER_FILE
    if not path.exists():
        raise FileNotFoundError(f"An adapter is a folder with {ADAPTER_FILE}; there is none at {str(path)!r}.")
    return path


def write(directory: Path, adapter: AdapterRecord) -> None:
    """Write a recorded adapter into a folder (Note [Adapter file])."""
    safetensors = needs("safetensors.torch")
    meta = [key for key, tensor in adapter.tensors.items() if tensor.is_meta]
    if meta:
        raise ValueError(f"Only tensors with memory can be saved; {meta[0]!r} is on the meta device.")
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in adapter.tensors.items()}
    text = json.dumps(describe(adapter), sort_keys=True)
    data = safetensors.save(tensors, {"format": "pt", "glora": text, "sha256": digest(text, tensors)})
    copy = json.dumps(describe(adapter), indent=2, sort_keys=True) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    # The copy last: between the two a reader is warned of the old copy, and has the whole new adapter.
    replace_file(directory / ADAPTER_FILE, lambda file: file.write(data))
    replace_file(directory / CONFIG_FILE, lambda file: file.write(copy.encode()))


def replace_file(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file beside `path`, flush it to the disk, and put it in place in one step."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with beside.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name itself reaches the disk with its folder; Windows cannot open one
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(file: Path) -> AdapterRecord:
    """Read and check an adapter's file (Note [Adapter file]).

    Raises:
        AdapterFileError: it is damaged or foreign.
    """
    tensors, metadata = read_safetensors(file)
    if "glora" not in metadata:
        raise AdapterFileError(
            f"An adapter of glora has its description in the file's metadata; {file} has none. If another library "
            f"wrote it, see glora.interop (load_peft, load_lycoris)."
        )
    text = metadata["glora"]
    if set(metadata) != {"format", "glora", "sha256"} or metadata["format"] != "pt" or len(text) > _MOST_TEXT:
        raise AdapterFileError(f"The metadata of {file} are not what glora writes; the file is damaged.")
    with file.open("rb") as opened:
        header = opened.read(int.from_bytes(opened.read(8), "little"))
    # Padding is spaces: other white space there means nothing to a parser, and is damage that the sum does not cover.
    if any(byte in header for byte in b"\t\n\r"):
        raise AdapterFileError(f"The header of {file} has white space that safetensors never writes; it is damaged.")
    if digest(text, tensors) != metadata["sha256"]:
        raise AdapterFileError(
            f"The contents of {file} do not have the SHA-256 sum that was saved with them; the file is damaged. Get it "
            f"again from where it came from."
        )
    adapter = _understand(file, parse_json(text, file), tensors)
    _compare_copy(file.with_name(CONFIG_FILE), text)
    return adapter


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata, from one reading of its bytes."""
    safetensors = needs("safetensors.torch")
    data = file.read_bytes()
    try:
        tensors = cast("dict[str, Tensor]", safetensors.load(data))
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = cast("dict[str, str]", header.get("__metadata__", {}))
    except Exception as error:  # whatever a parser makes of damaged bytes
        raise AdapterFileError(f"{file} is no whole safetensors file ({error}).") from error
    return tensors, metadata


def parse_json(text: str | bytes, file: Path) -> Any:
    """What a JSON text says, or an AdapterFileError."""
    if len(text) > _MOST_TEXT:
        raise AdapterFileError(f"The JSON of {file} is {len(text):,} bytes long, more than any adapter needs.")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"The JSON of {file} cannot be read ({error}).") from error


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of a description and of each tensor's name, dtype, shape and bytes."""
    total = hashlib.sha256(text.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        total.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(memoryview(cast("Any", tensor.reshape(-1).view(torch.uint8).numpy())))
    return total.hexdigest()


def describe(adapter: AdapterRecord) -> dict[str, Any]:
    """The description of an adapter, as JSON has it."""
    from glora import __version__

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
        }
    heads = {path: sorted(names) for path, names in adapter.heads.items()}
    return {"format_version": FORMAT_VERSION, "glora_version": __version__, "layers": layers, "heads": heads}


def _understand(file: Path, said: Any, tensors: Mapping[str, Tensor]) -> AdapterRecord:
    """The adapter that a description and tensors make, every field of it checked."""
    said = cast("dict[str, Any]", said if isinstance(said, dict) else {})
    if said.get("format_version") != FORMAT_VERSION:
        raise AdapterFileError(
            f"This glora reads adapter files of format {FORMAT_VERSION}; {file} has format "
            f"{said.get('format_version')!r}. Use the glora that wrote it, or a newer one."
        )
    try:
        by_path, by_head = cast("dict[str, dict[str, Any]]", said["layers"]), cast("dict[str, Any]", said["heads"])
        layers = {path: _understand_layer(fields) for path, fields in by_path.items()}
        heads = {path: tuple(map(str, names)) for path, names in by_head.items()}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise AdapterFileError(f"The description in {file} cannot be understood: {error!r}.") from error
    wanted: dict[str, tuple[int | None, ...] | None] = {
        join(path, name): None for path, names in heads.items() for name in names
    }
    for path, layer in layers.items():
        # -1 and -2 stand for sizes that the description leaves open, and that any tensor may have.
        sizes = (
            -1 if layer.out_features is None else layer.out_features,
            -2 if layer.in_features is None else layer.in_features,
        )
        for _, key, shape in layer.keys(path, *sizes):
            wanted[key] = tuple(None if size < 0 else size for size in shape)
    problems = list(check_tensors(tensors, wanted, set()))
    if problems:
        raise AdapterFileError(f"The tensors of {file} are not those of its description: {'; '.join(problems[:5])}.")
    return AdapterRecord(layers, heads, tensors)


def _understand_layer(fields: dict[str, Any]) -> LayerRecord:
    fields = dict(fields)
    shape = fields.pop("out_features"), fields.pop("in_features")
    bias = fields.pop("bias")
    if not all(size is None or (type(size) is int and size > 0) for size in shape) or type(bias) not in (
        bool,
        type(None),
    ):
        raise ValueError(f"sizes {shape} and bias {bias!r}")
    forms = {name: fields["forms"].get(name, "none") for name in FORMS}
    if not set(fields.pop("forms")) <= set(FORMS):
        raise ValueError("paths other than A to E")
    return LayerRecord(GLoRAConfig(**forms, **fields), *shape, bias)


def _compare_copy(file: Path, text: str) -> None:
    """Warn where the readers' copy says something else than the file."""
    if not file.exists():
        return
    if parse_json(file.read_bytes(), file) != json.loads(text):
        warnings.warn(
            f"{file} does not say what {ADAPTER_FILE} beside it says, which is what counts. It may have been edited, "
            f"or belong to another adapter; saving again renews it.",
            UserWarning,
            stacklevel=4,
        )


def needs(module: str) -> Any:
    """An optional module, or an error that names the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"Adapter files need {module.partition('.')[0]!r}, which cannot be imported ({error}). Install the extra: "
            f'pip install "glora[files]".'
        ) from error
