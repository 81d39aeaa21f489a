"""Modules that hold their matrices in every way that is known, and how to take the matrices out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Conv1D: Any = pytest.importorskip("transformers.pytorch_utils").Conv1D

At = tuple[int, ...]


class Experts(nn.Module):
    """What transformers' fused experts are: each token goes through one of them."""

    def __init__(self, experts: int, hidden: int, inner: int, transposed: bool, bias: bool) -> None:
        super().__init__()
        if bias:
            self.is_transposed = transposed
        up, down = (experts, 2 * inner, hidden), (experts, hidden, inner)
        if transposed:
            up, down = (up[0], up[2], up[1]), (down[0], down[2], down[1])
        self.gate_up_proj = nn.Parameter(torch.randn(up))
        self.down_proj = nn.Parameter(torch.randn(down))
        if bias:
            self.gate_up_proj_bias = nn.Parameter(torch.randn(experts, 2 * inner))
        self.transposed, self.bias = transposed, bias

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for expert in range(len(self.gate_up_proj)):
            up, down = self.gate_up_proj[expert], self.down_proj[expert]
            up, down = (up, down) if self.transposed else (up.T, down.T)
            inner = x[expert :: len(self.gate_up_proj)] @ up
            inner = inner + self.gate_up_proj_bias[expert] if self.bias else inner
            gate, value = inner.chunk(2, -1)
            total[expert :: len(self.gate_up_proj)] = (torch.tanh(gate) * value) @ down
        return total


@dataclass(frozen=True)
class Kind:
    """A module of some kind, and one matrix in it.

    Attributes:
        build: makes the model; the module is at `at` in it.
        call: runs the model.
        weight: the tensor's name; bias: its bias's, None where it has none.
        to_matrix: from the tensor (of one batch entry) to the matrix; back: and back, for a tensor's shape.
        batched: whether the first axis is a batch.
    """

    name: str
    build: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    weight: str = "weight"
    bias: str | None = "bias"
    to_matrix: Callable[[Tensor], Tensor] = lambda tensor: tensor
    back: Callable[[Tensor, torch.Size], Tensor] = lambda matrix, shape: matrix.reshape(shape)
    batched: bool = False
    swept: bool = True
    attention: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def path(self) -> str:
        return "0" if self.weight == "weight" else f"0.{self.weight}"

    def module(self, model: nn.Module) -> nn.Module:
        return model[0]

    def call(self, model: nn.Module, x: Tensor) -> Tensor:
        if self.attention:
            module = model[0]
            others = x[..., : module.kdim], x[..., : module.vdim]
            return module(x, *others, need_weights=False)[0]
        return model(x.long() if isinstance(model[0], nn.Embedding) else x)

    def batch(self, W0: Tensor) -> Iterator[At]:
        yield from ((index,) for index in range(len(W0))) if self.batched else [()]

    def matrix(self, W0: Tensor, at: At) -> Tensor:
        return self.to_matrix(W0[at])

    def put(self, weight: Tensor, at: At, matrix: Tensor) -> None:
        weight[at] = self.back(matrix, weight[at].shape)


def transposed(matrix: Tensor) -> Tensor:
    return matrix.T


def untransposed(matrix: Tensor, shape: torch.Size) -> Tensor:
    assert matrix.T.shape == shape
    return matrix.T


def rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), -1)


def conv1d(out_features: int, in_features: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = Conv1D(out_features, in_features)
        nn.init.normal_(layer.bias)
        return nn.Sequential(layer)

    return build


def experts(transposed: bool, bias: bool) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(Experts(3, 4, 4 if bias else 3, transposed, bias))


def attention(**options: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        nn.init.normal_(layer.in_proj_bias)
        return nn.Sequential(layer)

    return build


def normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def tokens(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(5, shape, generator=torch.Generator().manual_seed(3))


def of(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(layer())


_CONV = {"to_matrix": rows, "swept": False}
_TRANSPOSED = {"to_matrix": transposed, "back": untransposed}
_UP, _UP_BIAS = "gate_up_proj", "gate_up_proj_bias"

KINDS = [
    Kind("Conv1D", conv1d(5, 3), normal(2, 6, 3), **_TRANSPOSED),
    Kind("square Conv1D", conv1d(4, 4), normal(6, 4), **_TRANSPOSED),
    Kind("Conv1d", of(lambda: nn.Conv1d(3, 4, 2)), normal(2, 3, 5), **_CONV),
    Kind("grouped Conv2d", of(lambda: nn.Conv2d(4, 6, (2, 3), groups=2)), normal(2, 4, 4, 4), **_CONV),
    Kind("square Conv2d", of(lambda: nn.Conv2d(4, 4, 1)), normal(2, 4, 2, 3), **_CONV),
    Kind("depthwise Conv1d", of(lambda: nn.Conv1d(4, 4, 3, groups=4)), normal(2, 4, 4), **_CONV),
    Kind("Conv3d", of(lambda: nn.Conv3d(2, 3, 2)), normal(1, 2, 3, 3, 2), **_CONV),
    Kind("in_proj", attention(), normal(2, 3, 4), "in_proj_weight", "in_proj_bias", attention=True),
    Kind("k_proj", attention(kdim=3, vdim=2), normal(2, 3, 4), "k_proj_weight", None, attention=True),
    Kind("experts up", experts(False, False), normal(7, 4), _UP, None, batched=True),
    Kind("experts down", experts(False, False), normal(7, 4), "down_proj", None, batched=True),
    Kind("transposed experts up", experts(True, False), normal(7, 4), _UP, None, batched=True, **_TRANSPOSED),
    Kind("experts with bias", experts(True, True), normal(7, 4), _UP, _UP_BIAS, batched=True, **_TRANSPOSED),
    Kind("Embedding", of(lambda: nn.Embedding(5, 3)), tokens(2, 4), bias=None, swept=False),
    Kind("square Embedding", of(lambda: nn.Embedding(5, 5)), tokens(4, 2), bias=None, swept=False),
    Kind("square experts", experts(True, True), normal(7, 4), "down_proj", None, batched=True, **_TRANSPOSED),
]
