"""What the tests of files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import glora


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False))


def saved(directory: Path, seed: int = 0) -> nn.Module:
    made = glora.apply(
        small_model(seed), ["0", "2"], glora.GLoRAConfig(init="random", rank=2, create_bias=True), trainable=["1"]
    )
    with torch.no_grad():
        for parameter in glora.parameters(made):
            parameter.add_(0.1)
    glora.save(made, directory)
    return made


def stored_sum(directory: Path) -> str:
    """The sum over all that the file says; its bytes may differ, safetensors orders metadata at random."""
    from safetensors import safe_open

    with safe_open(directory / "adapter_model.safetensors", framework="pt") as opened:
        return opened.metadata()["sha256"]


def half_precision_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3)).bfloat16()


def saved_half_precision(directory: Path, **options: Any) -> nn.Module:
    config = glora.GLoRAConfig(init="random", rank=2, **options)
    model = glora.apply(half_precision_model(), ["0", "1"], config, trainable=["3"])
    with torch.no_grad():
        for parameter in glora.parameters(model):
            parameter.add_(0.1)
    glora.save(model, directory)
    return model
