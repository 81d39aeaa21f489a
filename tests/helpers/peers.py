"""What the tests of other libraries' files share."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import glora
from tests.helpers.calls import attach
from tests.helpers.kinds import Experts

Conv1D: Any = pytest.importorskip("transformers.pytorch_utils").Conv1D


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"q": nn.Linear(6, 8), "k": nn.Linear(8, 8, bias=False)})
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.block["k"](self.block["q"](x)))))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(7))


def adapted(**options: Any) -> nn.Module:
    torch.manual_seed(2)
    targets, trainable = options.pop("targets", ["q", "k"]), options.pop("trainable", ())
    config = glora.GLoRAConfig.glora(init="random", rank=3, **options)
    model = attach(net(), config, targets=targets, trainable=trainable).eval()
    with torch.no_grad():
        for parameter in glora.parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@dataclass(frozen=True)
class Layers:
    """Two linear layers, `block.0` and `block.1`, and a head; `model` makes them, the same each time."""

    sizes: tuple[int, int, int]
    biases: tuple[bool, bool]
    seed: int

    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        (i, hidden, o), (first, second) = self.sizes, self.biases
        block = nn.Sequential(nn.Linear(i, hidden, bias=first), nn.Linear(hidden, o, bias=second))
        return nn.Sequential(OrderedDict(block=block, head=nn.Linear(o, 2))).eval()

    def input(self) -> Tensor:
        return torch.randn(3, self.sizes[0], generator=torch.Generator().manual_seed(self.seed))

    def with_biases(self) -> Layers:
        return replace(self, biases=(True, True))


def layers() -> st.SearchStrategy[Layers]:
    size = st.integers(1, 6)
    return st.builds(Layers, st.tuples(size, size, size), st.tuples(st.booleans(), st.booleans()), st.integers(0, 99))


class Every(nn.Module):
    """Layers of every kind that an adapter can be on, each with its own bias or none."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 6)
        self.q, self.k = nn.Linear(6, 8), nn.Linear(8, 4, bias=False)
        self.c = Conv1D(6, 4)
        self.conv1, self.conv2 = nn.Conv1d(6, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1, bias=False)
        self.experts = Experts(3, 5, 4, transposed, bias=transposed)
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 3)
        nn.init.normal_(self.c.bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.c(self.k(torch.tanh(self.q(self.emb(ids))))))
        x = torch.relu(self.conv2(torch.tanh(self.conv1(x.mT)).unsqueeze(2))).squeeze(2)
        x = x.mT.flatten(1)[:, :5]
        return self.head(self.norm(x + self.experts(x)))


def every(seed: int = 0, transposed: bool = False) -> Every:
    torch.manual_seed(seed)
    return Every(transposed).eval()


IDS = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(5))


def assert_same(ours: Tensor, theirs: Tensor, base: Tensor) -> float:
    """Equal to 1e-5 of what the adapter changes, beside the rounding of float32; the error as a share of that."""
    effect = float((theirs - base).abs().max())
    error = float((ours - theirs).abs().max())
    assert error <= 1e-5 * effect + 4e-6 * float(base.abs().max()), (error, effect)
    return error / effect if effect else 0.0
