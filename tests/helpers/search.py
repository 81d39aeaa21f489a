"""Supernets that tests share."""

from __future__ import annotations

import random
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import glora
from glora import GLoRAConfig
from glora.search import Space
from tests.helpers.calls import FORMS, quiet


def supernet(model: nn.Module, space: Space | None = None, targets: Any = "all-linear", **given: Any) -> nn.Module:
    """A supernet whose every tensor is random, as after training."""
    with quiet():
        glora.search.supernet(model, targets, space or Space(), **given)
    with torch.no_grad():
        for parameter in glora.parameters(model, given.get("name")):
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def block(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 6))


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Any space with a path on the weight, with mixed ranks."""
    lists = {path: draw(st.lists(st.sampled_from(forms), min_size=1, unique=True)) for path, forms in FORMS.items()}
    if all(lists[path] == ["none"] for path in "AB"):
        lists["B"] = ["none", "lora"]
    return Space(
        **lists,
        ranks=draw(st.lists(st.integers(1, 5), min_size=1, max_size=3, unique=True)),
        alpha=draw(st.sampled_from([None, 1.0, 6.0])),
        product=draw(st.sampled_from(["hadamard", "matmul"])),
    )


def any_config(space: Space, seed: int) -> GLoRAConfig:
    rng = random.Random(seed)
    return space.config({path: rng.choice(forms) for path, forms in space.forms.items()}, rng.choice(space.ranks))


def any_choice(model: nn.Module, seed: int) -> dict[str, GLoRAConfig]:
    """A choice with one path at least."""
    found: dict[str, GLoRAConfig] = {}
    while not any(config.paths for config in found.values()):
        seed += 1
        layers = enumerate(glora.search.spaces(model).items())
        found = {path: any_config(space, seed + i) for i, (path, space) in layers}
    return found


def inherited(whole: dict[str, Tensor], path: str, config: GLoRAConfig) -> dict[str, Tensor]:
    """What the issue says that a layer's forms inherit from the tensors of the largest."""
    prefix = f"{path}." if path else ""
    found: dict[str, Tensor] = {}
    for p, form in config.forms.items():
        left, right, value = (whole.get(f"{prefix}{p}.{name}") for name in ("left", "right", "value"))
        if form == "lora" and left is not None and right is not None:
            found[f"{p}.left"], found[f"{p}.right"] = left[:, : config.rank], right[: config.rank]
        elif form == "vector":
            column = value if left is None else left[:, 0]
            shape = {"A": (1, -1) if config.product == "matmul" else (-1, 1), "B": (-1, 1), "C": (-1, 1)}.get(p, (-1,))
            found[f"{p}.value"] = column.reshape(shape)
        elif form == "constant":
            found[f"{p}.value"] = (value if left is None else left).reshape(-1)[0].reshape(1)
    return found
