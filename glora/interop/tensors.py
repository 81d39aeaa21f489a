"""Files of tensors: safetensors, or what torch.save wrote of tensors alone."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from glora.files.container import read_safetensors
from glora.spec import AdapterFileError


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Key to tensor; a file of torch.save is read with `weights_only=True`, which runs no code of the file's.

    Raises:
        AdapterFileError: a file that is damaged, or holds anything but tensors under string keys.
        FileNotFoundError: no file.
    """
    if not file.exists():
        raise FileNotFoundError(f"There is no file {str(file)!r}.")
    if file.suffix == ".safetensors":
        return read_safetensors(file).tensors
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader makes of damaged bytes
        raise AdapterFileError(f"{file} cannot be read as tensors alone ({error}).") from error
    if not isinstance(held, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in cast("dict[object, object]", held).items()
    ):
        raise AdapterFileError(f"{file} must hold tensors under their names, and holds something else.")
    return cast("dict[str, Tensor]", held)
