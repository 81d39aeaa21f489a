"""Safetensors files: read whole, checked, and put in place in one step."""

from __future__ import annotations

import importlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from torch import Tensor

from glora.spec import AdapterFileError

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def adapter_file(directory: str | os.PathLike[str]) -> Path:
    """The adapter's file in a folder, or the file itself."""
    path = Path(directory)
    if path.is_dir():
        path = path / ADAPTER_FILE
    if not path.exists():
        raise FileNotFoundError(f"An adapter is a folder with {ADAPTER_FILE}; there is none at {str(path)!r}.")
    return path


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata, from one reading of its bytes."""
    safetensors = import_optional("safetensors.torch")
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
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"The JSON of {file} cannot be read ({error}).") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors, wherever they lie in memory, into one file, put in place in one step."""
    data = import_optional("safetensors.torch").save(plain_tensors(tensors), {"format": "pt", **(metadata or {})})
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: file.write(data))


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: on the CPU, contiguous, no two sharing memory."""
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}


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


def import_optional(module: str) -> Any:
    """An optional module, or an error that names the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"Adapter files need {module.partition('.')[0]!r}, which cannot be imported ({error}). Install the extra: "
            f'pip install "glora[files]".'
        ) from error
