"""A search whose best choice is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import glora
from glora.search import Result, Space, choose, evolve
from tests.helpers.search import supernet

SPACE = Space(A=["vector", "constant", "none"], C=["none"], D=["none"], ranks=[1, 2])


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def build() -> nn.Module:
    torch.manual_seed(3)
    return supernet(plain(), SPACE)


X = torch.linspace(-2, 2, 64).reshape(16, 4).sin()
BEST = {
    "0": SPACE.config({"A": "vector", "B": "lora"}, 2),
    "2": SPACE.config({"E": "vector"}, 1),
    "4": SPACE.config({"B": "vector", "E": "constant"}, 1),
}


def planted(model: nn.Module) -> Callable[[nn.Module], float]:
    """A score whose best choice is BEST: the closer to its outputs, the better."""
    with torch.no_grad():
        wanted = choose(model, BEST)(X)
        choose(model, None)
        return lambda net: -(net(X) - wanted).square().mean().item()


def search(model: nn.Module | None = None, evaluate: Any = None, **given: Any) -> Result:
    model = build() if model is None else model
    with torch.no_grad():
        return evolve(model, planted(model) if evaluate is None else evaluate, **given)


def history(result: Result) -> list[object]:
    """All that a search did."""
    return [(t.number, dict(t.targets), t.parameters, t.score, t.error) for t in result.trials]


BUDGET = glora.plan(plain(), BEST).parameters
