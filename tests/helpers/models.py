"""Models that tests share."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glora
from glora import GLoRAConfig
from tests.helpers.calls import RANDOM, attach


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))


def adapted_block(**arguments: Any) -> nn.Sequential:
    return glora.apply(block(), config=RANDOM, **arguments)


def without_bias() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4), nn.Linear(4, 4, bias=False))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.k_proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([Block(), Block()])
        self.act = nn.ReLU()
        self.head = nn.Linear(4, 10)


class Pair(nn.Module):
    """A layer that is fit to be adapted, and one that a test makes unfit."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.good = nn.Linear(4, 4)
        self.bad = nn.Linear(4, 4, bias=bias)


class Scaled(nn.Linear):
    """A linear layer with a parameter and a buffer of its own behind weight and bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.scale = nn.Parameter(torch.ones(out_features))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 3, bias=False)
        self.third = Scaled(3, 3)
        self.head = nn.Linear(3, 2)
        self.embed.weight.requires_grad_(False)
        self.third.scale.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.second(torch.tanh(self.norm(self.first(self.embed(tokens)))))
        return self.head(torch.tanh(self.third(x)))


def build() -> Model:
    """A model in eval mode whose norm is no identity."""
    model = Model().eval()
    with torch.no_grad():
        for tensor in (model.norm.weight, model.norm.bias, model.norm.running_mean):
            assert tensor is not None
            tensor.copy_(torch.randn_like(tensor))
    return model


ALL_OF_NET = [*(f"layers.{i}.{name}" for i in (0, 1) for name in ("q_proj", "k_proj")), "head"]
TOKENS = torch.arange(7)


def two(model: nn.Module) -> None:
    attach(model, GLoRAConfig.lora(rank=1, init="random"), name="a", trainable=["head"])
    attach(model, RANDOM, name="b", trainable=["head"])


def inactive(model: nn.Module) -> None:
    attach(model)
    glora.activate(model, {})


ATTACH: dict[str, Callable[[nn.Module], object]] = {
    "all paths": attach,
    "weight alone": lambda model: attach(model, GLoRAConfig.lora(rank=2, init="random")),
    "bias alone": lambda model: attach(model, GLoRAConfig.glora(A="none", B="none", init="random")),
    "created bias": lambda model: attach(model, GLoRAConfig.glora(rank=1, init="random", create_bias=True)),
    "heads": lambda model: attach(model, trainable=["norm", "head"]),
    "one layer": lambda model: attach(model, targets=["second"]),
    "two": two,
    "inactive": inactive,
}
attached = pytest.mark.parametrize("how", ATTACH.values(), ids=ATTACH)


@contextmanager
def merged_inside_disabled(model: nn.Module) -> Generator[nn.Module]:
    with glora.disabled(model), glora.merged(model):
        yield model


STATES: dict[str, Callable[[nn.Module], AbstractContextManager[object]]] = {
    "attached": nullcontext,
    "merged": glora.merged,
    "disabled": glora.disabled,
    "merged inside disabled": merged_inside_disabled,
}
in_states = pytest.mark.parametrize("state", STATES.values(), ids=STATES)


class Residual(nn.Module):
    """A small transformer block's worth of layers, with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(h + self.down(torch.relu(self.up(self.norm(h)))))


def three_adapters() -> Residual:
    torch.manual_seed(0)
    model = Residual()
    for name, targets, trainable in (
        ("a", ["up", "down"], ["head"]),
        ("b", ["up"], ["norm", "head"]),
        ("c", "all-linear", ()),
    ):
        attach(model, targets=targets, config=glora.GLoRAConfig.glora(init="random"), name=name, trainable=trainable)
        with torch.no_grad():
            for parameter in glora.parameters(model, name):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def two_adapters() -> nn.Module:
    return glora.delete(three_adapters(), "c")
