"""Safetensors files: read and checked in one step, replaced in one step."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from glora.fingerprint import Fingerprint
from glora.spec import AdapterFileError

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "glora_config.json"
PEFT_CONFIG_FILE = "adapter_config.json"  # PEFT's; earlier versions of glora gave their own this name

_MOST_HEADER = 100_000_000  # bytes: safetensors reads no larger header
# Seconds without a write after which a temporary file counts as left by a killed save. This long, because the first
# shard of a large merge waits until the last one is written.
_STALE = 24 * 3600.0


class Contents(NamedTuple):
    """What a safetensors file holds; `header` is its JSON as it stands in the file, padding included."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    header: bytes


class Header(NamedTuple):
    """What a safetensors file says of its tensors: key to dtype, shape and offsets, counted from byte `start`."""

    tensors: dict[str, Any]
    metadata: dict[str, str]
    start: int


def adapter_file(directory: str | os.PathLike[str]) -> Path:
    """The adapter's file in a folder, or the file itself."""
    path = Path(directory)
    if path.is_dir():
        path = path / ADAPTER_FILE
    if path.suffix == ".json":
        raise AdapterFileError(
            f"An adapter is a folder with {ADAPTER_FILE}; found {str(path)!r}. Pass {str(path.parent)!r}."
        )
    if not path.exists():
        hub = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(directory)) and not Path(directory).exists():
            hub = " A repository of a hub is downloaded first: huggingface_hub.snapshot_download gives its folder."
        raise FileNotFoundError(f"An adapter is a folder with {ADAPTER_FILE}; there is none at {str(path)!r}.{hub}")
    return path


@contextlib.contextmanager
def parsing(file: Path, expected: str = "a complete safetensors file") -> Generator[None]:
    """Turn whatever a parser raises on damaged bytes into an AdapterFileError; first, the file must exist."""
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {str(file)!r}.")
    try:
        yield
    except (MemoryError, OSError):
        raise
    except Exception as error:
        raise AdapterFileError(f"{file} cannot be read as {expected} ({error}).") from error


def read_safetensors(file: Path) -> Contents:
    """All of a safetensors file, from one reading of its bytes."""
    safetensors = import_optional("safetensors.torch")
    with parsing(file):
        data = file.read_bytes()
        tensors = cast("dict[str, Tensor]", safetensors.load(data))
        header = data[8 : 8 + int.from_bytes(data[:8], "little")]
        return Contents(tensors, json.loads(header).get("__metadata__") or {}, header)


def read_header(file: Path) -> Header:
    """The header of a safetensors file, without reading the tensors."""
    safe_open = import_optional("safetensors").safe_open
    with parsing(file), safe_open(os.fspath(file), framework="pt"), file.open("rb") as opened:  # safe_open checks it
        size = int.from_bytes(opened.read(8), "little")
        tensors: dict[str, Any] = json.loads(opened.read(size))
        return Header(tensors, tensors.pop("__metadata__", None) or {}, 8 + size)


def parse_json(text: str | bytes, file: Path) -> Any:
    """What a JSON text says, or an AdapterFileError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"The JSON of {file} cannot be read ({error}).") from error


def parse_fingerprints(raw: Any) -> dict[str, Fingerprint]:
    """Key to fingerprint, from parsed JSON.

    Raises:
        TypeError, ValueError, AttributeError, OverflowError: it is anything else.
    """
    fingerprints = {str(key): tuple([float(number) for number in numbers]) for key, numbers in raw.items()}
    if not all(len(numbers) and all(map(math.isfinite, numbers)) for numbers in fingerprints.values()):
        raise ValueError("fingerprints that are empty or not finite")
    return fingerprints


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: on the CPU, contiguous, no two sharing memory.

    Raises:
        ValueError: one is on the meta device.
    """
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"Only tensors with memory can be saved; {key!r} is on the meta device.")
    # By its format: `contiguous` leaves the strides of a tensor of one number as they are.
    copied = torch.contiguous_format
    return {key: tensor.detach().cpu().clone(memory_format=copied) for key, tensor in tensors.items()}


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of one of `plain_tensors`, without a copy, and without numpy, which torch itself would ask for."""
    buffer: Any = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.nbytes else bytearray()
    if tensor.nbytes:
        buffer.tensor = tensor  # the view holds the buffer, and so the memory
    return memoryview(buffer).cast("B")


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file of plain tensors.

    Raises:
        ValueError: names and metadata that are longer than readers of such files accept.
    """
    safetensors, _ = import_optional("safetensors.torch"), import_optional("numpy")  # by which it writes
    try:
        data = safetensors.save(tensors, {"format": "pt", **(metadata or {})})
    except import_optional("safetensors").SafetensorError as error:
        raise ValueError(f"{len(tensors):,} tensors cannot be written into one safetensors file ({error}).") from error
    if int.from_bytes(data[:8], "little") > _MOST_HEADER:  # older versions of safetensors write it
        raise ValueError(
            f"The header of a safetensors file has at most {_MOST_HEADER:,} bytes; {len(tensors):,} tensors and their "
            f"description need more. Adapt fewer layers in one adapter."
        )
    return data


# Note [Replacing files]
# All files are written under temporary names and flushed to the disk before the first is renamed: an error leaves the
# old files. Of several files the last one describes the others (an index, a config). The old one is removed first and
# the new one put in place last: a kill in between leaves no description, rather than a wrong one.
def replace_files(
    contents: Mapping[Path, bytes | Callable[[BinaryIO], object]], *, obsolete: Iterable[Path] = ()
) -> None:
    """Put files of one folder in place, the last one describing the others (Note [Replacing files]).

    Args:
        contents: path to its bytes, or to a function that writes them into the open file.
        obsolete: files of the same folder to remove: they describe files that are replaced.
    """
    last = list(contents)[-1]
    for path in contents:
        if path.is_dir():
            raise IsADirectoryError(f"A file can be written only where no folder has its name; {path} is a folder.")
    last.parent.mkdir(parents=True, exist_ok=True)
    temporaries = {path: path.with_name(f".{path.name}.{uuid.uuid4().hex}") for path in contents}
    try:
        for path, content in contents.items():
            with temporaries[path].open("xb") as file:
                file.write(content) if isinstance(content, bytes) else content(file)
                file.flush()
                os.fsync(file.fileno())
        for old in (*obsolete, *([last] if len(contents) > 1 else [])):
            old.unlink(missing_ok=True)
        for path, temporary in temporaries.items():
            if path == last:
                _sync(last.parent)  # the others must reach the disk first
            os.replace(temporary, path)
        _sync(last.parent)
    except BaseException:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise
    _remove_stale(last.parent, {path.name for path in contents})


def _sync(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    if os.name == "posix":  # Windows cannot open a folder
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _remove_stale(folder: Path, names: set[str]) -> None:
    """Remove the temporary files that killed saves of these files left."""
    for file in folder.iterdir():
        match = re.fullmatch(r"\.(.+)\.[0-9a-f]{32}", file.name, re.DOTALL)
        with contextlib.suppress(OSError):  # another save may have removed it
            if match and match[1] in names and time.time() - file.lstat().st_mtime > _STALE:
                file.unlink()


def import_optional(module: str, extra: str = "files") -> Any:
    """An optional module, or an ImportError that names the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"This needs {module.partition('.')[0]!r}, which cannot be imported ({error}). Install the extra that "
            f'brings it: pip install "glora[{extra}]".'
        ) from error
