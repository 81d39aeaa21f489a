"""The room `precision`, and the care for small numbers that no single kernel owns."""

from __future__ import annotations

import contextlib
from itertools import product

import pytest
import torch
from torch import nn

import glora
from glora.precision import in_autocast, multiply, outside_autocast, wide, working_dtype
from tests.helpers.calls import only
from tests.helpers.kernels import run_kernel
from tests.helpers.strategies import DTYPES, HALF


@pytest.mark.parametrize("dtypes", [*product(DTYPES, DTYPES)], ids=str)
def test_the_working_dtype_is_the_widest_and_float32_at_least(dtypes: tuple[torch.dtype, ...]) -> None:
    tensors = [torch.ones(1, dtype=dtype) for dtype in dtypes]
    assert working_dtype(*tensors) == (torch.float64 if torch.float64 in dtypes else torch.float32)
    assert wide(tensors[0]).dtype == working_dtype(tensors[0])
    assert (wide(tensors[0]) is tensors[0]) is (dtypes[0] not in HALF)


@pytest.mark.parametrize("dtypes", [*product(DTYPES, DTYPES)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_product_is_computed_in_the_working_dtype_also_under_autocast(
    dtypes: tuple[torch.dtype, ...], autocast: bool
) -> None:
    left, right = torch.randn(3, 4, dtype=dtypes[0]), torch.randn(4, 2, dtype=dtypes[1])
    dtype = working_dtype(left, right)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = multiply(left, right)
    assert torch.equal(found, left.to(dtype) @ right.to(dtype))


def test_autocast_is_off_inside_and_on_again_after() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with outside_autocast(x):
            assert not in_autocast(x)
        assert in_autocast(x)
    assert not in_autocast(x)


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
