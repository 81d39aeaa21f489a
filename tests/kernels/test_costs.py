"""A training step costs what was promised: matrix products and saved bytes, counted."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import glora
from benchmarks.counting import count_products, count_saved
from tests.helpers.calls import FORMS, factors_of, only


def one(config: glora.GLoRAConfig, count: int = 1, dtype: torch.dtype = torch.float32) -> nn.Module:
    layer: nn.Module = nn.Linear(1024, 1024, dtype=dtype)
    for i in range(count):
        glora.apply(layer, config=config, name=f"a{i}")
    return glora.activate(layer, {f"a{i}": 1.0 for i in range(count)})


N = 2048


BUDGET = [
    *[(only(A="lora", B=B), 1, None, 3.06, 0.05) for B in FORMS["B"]],
    *[(only(A="none", B=B), 1, None, 2.10, 0.05) for B in FORMS["B"] if B != "none"],
    *[(only(A=A, B=B), 1, None, 2.10, N / 1024 + 0.05) for A in ("vector", "constant") for B in FORMS["B"]],
    (only(A="lora", product="matmul"), 1, None, 2.12, 0.10),
    (only(A="lora", B="lora"), 4, None, 3.3, 0.10),
    *[
        (only(A="lora", C=C, D="vector", E="vector"), 1, half, 4.1, 0.05)
        for half in ("bf16", "fp16", "autocast")
        for C in FORMS["C"]
    ],
]


@pytest.mark.parametrize(("config", "count", "half", "units", "share"), BUDGET)
def test_a_training_step_costs_what_was_promised(
    config: glora.GLoRAConfig, count: int, half: str | None, units: float, share: float
) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(half or "", torch.float32)
    layer = one(config, count, dtype)
    x = torch.randn(N, 1024, dtype=dtype, requires_grad=True)
    autocast = torch.autocast("cpu", torch.bfloat16) if half == "autocast" else contextlib.nullcontext()
    with count_products() as products:
        with count_saved([x, *layer.parameters()]) as saved, autocast:
            y = layer(x)
        torch.autograd.grad(y, [x, *factors_of(layer)], torch.ones_like(y))
    W0 = 1024 * 1024 * layer.weight.element_size()
    assert products.flops / (2 * N * 1024 * 1024) <= units
    assert saved.bytes / W0 <= share


def test_the_counters_see_what_they_should() -> None:
    x, W = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    with count_products() as count:
        y = F.linear(x, W)
        torch.autograd.grad(y.sum(), x)
        torch.zeros(4, 5).addmm_(x.detach(), W.T)
        torch.einsum("ni,oi->no", x.detach(), W)
        torch.mv(W, x[0].detach())
    assert (count.calls, count.flops) == (5, 4 * 2 * 4 * 3 * 5 + 2 * 3 * 5)
