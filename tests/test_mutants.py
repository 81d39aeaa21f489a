"""What `mutmut run` found that no other test noticed: the sizes of a random start, and the care for half precision."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import glora
from tests.helpers.calls import only
from tests.helpers.kernels import run_kernel


@pytest.mark.parametrize("entry", [0.0, 0.003, 2.0])
@pytest.mark.parametrize("path", ["A", "B", "C", "D", "E"])
def test_a_random_start_draws_half_to_three_halves_of_its_size_in_either_sign(path: str, entry: float) -> None:
    inp, out = (4096, 3) if path == "C" else (3, 4096)
    plain = nn.Linear(inp, out)
    nn.init.constant_(plain.weight, entry)
    layer = glora.apply(plain, config=only(**{path: "vector"}, init="random"))
    (value,) = glora.parameters(layer)
    norm = entry * (out * inp) ** 0.5 or out**0.5  # a weight of zeros counts as nn.Linear's own start
    size = {"B": 0.1 * norm / (out * inp) ** 0.5, "E": 0.1 * norm / out**0.5}.get(path, 0.1)
    sizes = value.detach().abs() / size
    assert 0.499 < sizes.min() < 0.51
    assert 1.49 < sizes.max() < 1.501
    assert 0.45 < (value > 0).float().mean() < 0.55


def test_the_size_of_a_half_precision_weight_does_not_overflow() -> None:
    plain = nn.Linear(64, 64, dtype=torch.float16)
    nn.init.constant_(plain.weight, 100.0)  # the squares sum up to 4e7
    layer = glora.apply(plain, config=only(B="vector", init="random"))
    assert torch.isfinite(layer.weight).all()


def test_rank_dropout_of_a_double_layer_is_in_double_precision() -> None:
    config = only(B="lora", rank=1, rank_dropout=0.3, init="random")
    layer = glora.apply(nn.Linear(1, 1, bias=False, dtype=torch.float64), config=config)
    x, base = torch.ones(1, 1, dtype=torch.float64), layer.parametrizations.weight.original
    whole = layer.eval()(x) - base
    layer.train()
    kept = [change for change in (layer(x) - base for _ in range(50)) if change.abs() > 1e-9]
    assert kept
    for change in kept:
        torch.testing.assert_close(change, whole / 0.7, rtol=1e-13, atol=0)


def test_rank_dropout_is_drawn_on_the_device_of_the_factors() -> None:
    layer = glora.apply(nn.Linear(4, 3, device="meta"), config=only(B="lora", rank_dropout=0.5)).train()
    assert layer(torch.empty(2, 4, device="meta")).shape == (2, 3)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_thin_product_in_float16_does_not_overflow(autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.float16
    layer = glora.apply(nn.Linear(64, 4, dtype=dtype), config=only(B="lora", rank=2, alpha=2))
    x = torch.full((3, 64), 30.0, dtype=dtype)
    with torch.no_grad():
        left, right = glora.parameters(layer)
        left.fill_(1e-4)
        right.fill_(100.0)  # x times it is 192000
    with torch.autocast("cpu", torch.float16) if autocast else contextlib.nullcontext():
        (short,), (whole,) = (run_kernel(layer, x, kernel, grad=False) for kernel in ("factored", "dense"))
    assert torch.isfinite(short).all()
    torch.testing.assert_close(short, whole, rtol=1e-2, atol=1e-2)


def test_a_small_scale_of_the_inputs_survives_half_precision() -> None:
    # Less than half of bfloat16's spacing: added to x, it would be rounded away.
    layer = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    glora.apply(layer, config=only(A="vector", product="matmul"))
    x, scale = torch.randn(4096, 256).bfloat16(), 1.9e-3 * torch.randn(1, 256).sign()
    (value,) = glora.parameters(layer)
    with torch.no_grad():
        base = layer(x).float()
        value.copy_(scale)
        change = layer(x).float() - base
        true = (x.float() * scale) @ layer.parametrizations.weight.original.float().T
    # The share of the true change that is there; none would be.
    assert 0.7 < (change * true).sum() / true.square().sum() < 1.1
