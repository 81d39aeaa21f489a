"""Other libraries' files of tensors: safetensors, or what torch.save wrote of tensors alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from glora.files.container import parse_fingerprints, parse_json, parsing, plain_tensors, read_safetensors, serialize
from glora.fingerprint import Fingerprint
from glora.spec import AdapterFileError

_BASE = "glora_base"  # metadata that other readers ignore: the fingerprints of the adapter's base


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Fingerprint]]:
    """Key to tensor, and the fingerprints that `tensor_file` wrote; none in files of other libraries.

    A file of torch.save is read with `weights_only=True`, which runs no code of the file's.

    Raises:
        AdapterFileError: a file that is damaged, or holds anything but tensors under string keys.
        FileNotFoundError: no file.
    """
    if file.suffix == ".safetensors":
        tensors, metadata, _ = read_safetensors(file)
        try:
            return tensors, parse_fingerprints(parse_json(metadata.get(_BASE, "{}"), file))
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise AdapterFileError(f"The fingerprints in {file} cannot be understood: {error!r}.") from error
    with parsing(file, "tensors alone"):
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor)
        for key, value in cast("dict[object, object]", loaded).items()
    ):
        raise AdapterFileError(f"{file} must hold tensors under their names, and holds something else.")
    tensors = cast("dict[str, Tensor]", loaded)
    for key, tensor in tensors.items():
        if not _is_whole(tensor):
            raise AdapterFileError(f"{file} must hold dense tensors with all of their numbers; {key!r} is none.")
    return tensors, {}


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is a dense one, and no view that claims more numbers than its memory holds."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def tensor_file(tensors: Mapping[str, Tensor], base: Mapping[str, Fingerprint]) -> bytes:
    """A safetensors file of an adapter's tensors, with the fingerprints of its base in the metadata."""
    return serialize(plain_tensors(tensors), {_BASE: json.dumps(base)} if base else {})
