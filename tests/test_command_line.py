"""`python -m glora`: looking at and converting adapters without a model (merging: tests/files/test_checkpoint.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import glora
from glora.__main__ import main
from tests.helpers.files import saved_half_precision


def test_inspect_prints_the_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_half_precision(tmp_path / "adapter", A="vector", create_bias=True)
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    printed = capsys.readouterr().out
    assert "2 layers" in printed
    assert "A=vector B=lora C=vector D=vector E=vector" in printed
    assert "8x6" in printed
    assert "head" in printed


def test_convert_there_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    forms: dict[str, Any] = {"C": "none", "D": "none", "E": "none"}
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    for there, product in (("peft", "hadamard"), ("lycoris", "matmul")):
        glora.apply(model, config=glora.GLoRAConfig(init="random", rank=2, alpha=3, product=product, **forms))
        glora.save(model, tmp_path / "a")
        out = tmp_path / (f"{there}.safetensors" if there == "lycoris" else there)
        assert main(["convert", str(tmp_path / "a"), str(out), "--to", there]) == 0
        back = ["convert", str(out), str(tmp_path / "b"), "--to", "glora", "--base", str(tmp_path / "base.safetensors")]
        assert main(back) == 0
        again = glora.load(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8)), tmp_path / "b")
        again.load_state_dict(glora.base_state_dict(model))
        torch.testing.assert_close(again[1].weight, model[1].weight)
        glora.remove(model)


def test_the_command_exists() -> None:
    run = subprocess.run([sys.executable, "-m", "glora", "--help"], capture_output=True, text=True, check=True)
    assert "merge" in run.stdout
