"""Other libraries' files of tensors: nothing but tensors is read, and no code is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import glora
from glora import interop

CONFIG = glora.GLoRAConfig.glora()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nn.Linear(2, 2), "tensors alone"),
        ([torch.ones(2)], "under their names"),
        ({1: torch.ones(2)}, "under their names"),
        ({"0.Ad": 1.0}, "under their names"),
    ],
)
def test_what_torch_saved_beside_tensors_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "adapter.pt")
    with pytest.raises(glora.AdapterFileError, match=message):
        interop.load_official(nn.Sequential(nn.Linear(2, 2)), tmp_path / "adapter.pt", CONFIG)


@pytest.mark.parametrize("name", ["adapter.pt", "adapter.safetensors"])
def test_a_file_that_is_damaged_or_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        interop.load_official(nn.Sequential(nn.Linear(2, 2)), tmp_path / name, CONFIG)
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(glora.AdapterFileError, match=name):
        interop.load_official(nn.Sequential(nn.Linear(2, 2)), tmp_path / name, CONFIG)


@pytest.mark.parametrize("text", ["{", "[]", '{"0.weight": []}', '{"0.weight": ["x"]}', '{"0.weight": [1e999]}'])
def test_damaged_fingerprints_are_an_adapter_file_error(text: str, tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    save_file({"lycoris_0.alpha": torch.ones(())}, file, {"glora_base": text})
    with pytest.raises(glora.AdapterFileError, match="fingerprints"):
        interop.load_lycoris(nn.Sequential(nn.Linear(2, 2)), file)
