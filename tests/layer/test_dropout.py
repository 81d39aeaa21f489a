"""Rank dropout, draw by draw."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import glora
from tests.helpers import internals
from tests.helpers.calls import only
from tests.helpers.kernels import run_kernel
from tests.helpers.strategies import HALF, Case, cases, close


@pytest.mark.parametrize(
    ("path", "product"), [("A", "hadamard"), ("A", "matmul"), ("B", "hadamard"), ("C", "hadamard")]
)
@pytest.mark.parametrize("freeze", [True, False], ids=["frozen base", "trained base"])
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "not cached"])
@pytest.mark.parametrize("tokens", [1, 60])
def test_a_component_is_dropped_or_scaled_up_in_every_training_forward(
    path: str, product: str, freeze: bool, cached: bool, tokens: int
) -> None:
    config = only(**{path: "lora"}, product=product, rank=1, alpha=2.0, rank_dropout=0.4, init="random")
    layer, x = glora.apply(nn.Linear(6, 5), config=config, freeze=freeze), torch.randn(tokens, 6)
    with glora.disabled(layer):
        dropped = layer(x)
    kept = dropped + (layer.eval()(x) - dropped) / 0.6
    layer.train()
    for grad in (True, False):
        with torch.set_grad_enabled(grad), parametrize.cached() if cached else contextlib.nullcontext():
            draws = [layer(x) for _ in range(30)]
        is_kept = [torch.allclose(y, kept, atol=1e-5) for y in draws]
        assert all(torch.allclose(y, dropped, atol=1e-5) for y, k in zip(draws, is_kept, strict=True) if not k)
        assert {True, False} == set(is_kept)


@given(cases(dtypes=[torch.float64]), st.sampled_from([1, 11, 2**21]))
def test_a_draws_gradients_are_those_of_the_dense_kernel(case: Case, block: int) -> None:
    configs = tuple(dataclasses.replace(config, rank_dropout=0.5) for config in case.configs)
    layer, x = dataclasses.replace(case, configs=configs).build(), case.input().requires_grad_()
    found = []
    for kernel in (None, "dense"):
        torch.manual_seed(case.seed)
        with internals.entries_of_a_block(block):
            found.append(run_kernel(layer, x, kernel))
    assert all(close(a, b, ulps=2000) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("half", HALF)
def test_a_draw_in_half_precision_scales_by_the_same_numbers(half: torch.dtype) -> None:
    layer = glora.apply(nn.Linear(6, 5).to(half), config=only(B="lora", rank=1, rank_dropout=0.4, init="random"))
    layer.to(half)  # the factors too
    x = torch.randn(4, 6).to(half)
    with glora.disabled(layer):
        dropped = layer(x)
    kept = dropped + (layer.eval()(x) - dropped) / 0.6
    layer.train()
    for _ in range(20):
        y = layer(x)
        assert min((y - dropped).abs().max(), (y - kept).abs().max()) < 0.02
