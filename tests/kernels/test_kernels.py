"""Every kernel is the dense formula, in values, gradients and refusals."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import glora
from tests.helpers import internals, reference
from tests.helpers.calls import attach, factors_of, only
from tests.helpers.kernels import KINDS, run_kernel
from tests.helpers.strategies import cases, close, expected

SHAPES = [(5,), (2, 3), (1, 2, 2), (0,), (1,), (), (40, 3)]


@pytest.mark.parametrize("kernel", ["factored", "blockwise"])
@settings(max_examples=100)
@given(data=st.data(), shape=st.sampled_from(SHAPES), block=st.sampled_from([1, 11, 2**21]))
def test_every_kernel_is_the_dense_one_and_the_reference(
    data: st.DataObject, shape: tuple[int, ...], kernel: Any, block: int
) -> None:
    case = data.draw(cases(dtypes=[torch.float64, torch.float32], elementwise=kernel == "blockwise"))
    layer = case.build()
    x = case.input(*shape) if shape else torch.randn(case.in_features, dtype=case.dtype)
    x.requires_grad_()
    with internals.entries_of_a_block(block):
        short = run_kernel(layer, x, kernel)
    whole = run_kernel(layer, x, "dense")
    assert [t.shape for t in short] == [t.shape for t in whole]
    for a, b in zip(short, whole, strict=True):
        assert a.dtype == b.dtype
        assert close(a, b.double(), ulps=2000)
    plain = case.plain()
    weight, bias = expected(layer, case, plain.weight.detach(), None if plain.bias is None else plain.bias.detach())
    assert close(short[0], reference.linear(x.detach(), weight, bias), ulps=2000)


@pytest.mark.parametrize("kernel", ["factored", "blockwise", "expanded"])
@settings(max_examples=100)
@given(data=st.data(), shape=st.sampled_from(SHAPES))
def test_without_gradients_every_kernel_is_the_reference_in_every_dtype(
    data: st.DataObject, shape: tuple[int, ...], kernel: Any
) -> None:
    case = data.draw(cases(elementwise=kernel != "factored"))
    layer = case.build()
    x = case.input(*shape) if shape else torch.randn(case.in_features).to(case.dtype)
    plain = case.plain()
    weight, bias = expected(layer, case, plain.weight.detach(), None if plain.bias is None else plain.bias.detach())
    (y,) = run_kernel(layer, x, kernel, grad=False)
    assert y.dtype == case.dtype
    size = 64 if case.dtype in (torch.bfloat16, torch.float16) else 2000
    wanted = reference.linear(x, weight, bias)
    # In half precision terms are rounded at the size of the terms, not of their sum.
    terms = reference.linear(x.abs(), weight.abs() + plain.weight.abs(), bias.abs())
    bound = size * torch.finfo(case.dtype).eps * torch.clamp(terms, min=1.0)
    assert y.shape == wanted.shape
    assert bool(((y.double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("config", [glora.GLoRAConfig(), glora.GLoRAConfig(A="vector"), glora.GLoRAConfig.lora()])
def test_half_precision_gradients_are_those_of_float32(half: torch.dtype, autocast: bool, config: Any) -> None:
    torch.manual_seed(1)
    config = glora.GLoRAConfig(**{**config.forms, "init": "random"})
    layer = glora.apply(nn.Linear(48, 40), config=config)
    x = torch.randn(64, 48).to(half).float().requires_grad_()
    if not autocast:
        layer.to(half)
        for parameter in factors_of(layer):
            parameter.data = parameter.data.float()
    wide = glora.apply(nn.Linear(48, 40), config=config)
    wide.load_state_dict({k: v.float() for k, v in layer.state_dict().items()})
    wanted = run_kernel(wide, x, "dense")
    with torch.autocast("cpu", half) if autocast else contextlib.nullcontext():
        found = run_kernel(layer, x if autocast else x.detach().to(half).requires_grad_(), None)
    assert found[0].dtype == half
    for a, b in zip(found, wanted, strict=True):
        assert (a.float() - b).norm() <= 0.03 * b.norm()


@pytest.mark.parametrize("name", KINDS)
def test_odd_strides(name: str) -> None:
    layer = glora.apply(nn.Linear(6, 5), config=KINDS[name])
    base = torch.randn(12, 4, 8)
    for x in (base.transpose(0, 2)[1:7].permute(2, 1, 0), base[:, :, ::2].repeat(1, 1, 2)[..., 1:7], base[:, ::2, 2:]):
        contiguous = x.contiguous()
        torch.testing.assert_close(layer(x), layer(contiguous))
    weight = nn.Linear(5, 6).weight.T  # a weight that is not contiguous
    plain = nn.Linear(6, 5)
    plain.weight = nn.Parameter(weight.detach())
    layer = glora.apply(plain, config=KINDS[name])
    x = torch.randn(4, 6, requires_grad=True)
    for a, b in zip(run_kernel(layer, x, None), run_kernel(layer, x, "dense"), strict=True):
        torch.testing.assert_close(a, b)


def test_a_wrong_input_raises_as_a_plain_layer_does() -> None:
    for config in KINDS.values():
        layer, plain = glora.apply(nn.Linear(6, 5), config=config), nn.Linear(6, 5)
        for x in (torch.randn(4, 3), torch.randn(2, 12), torch.randn(3, 6).double()):
            with pytest.raises(RuntimeError) as wanted:
                plain(x)
            with pytest.raises(RuntimeError) as found:
                layer(x)
            assert type(found.value) is type(wanted.value)


def test_four_adapters_of_all_kinds_share_one_pass() -> None:
    layer: nn.Module = nn.Linear(9, 7, dtype=torch.float64)
    for i, config in enumerate(KINDS.values()):
        attach(layer, config, name=f"a{i}")
    glora.activate(layer, {f"a{i}": 0.5 + i for i in range(4)})
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    for a, b in zip(run_kernel(layer, x, None), run_kernel(layer, x, "dense"), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad(), internals.force_kernel("expanded"):
        expanded = layer(x)
    torch.testing.assert_close(expanded, layer(x))


SURVIVAL: list[Any] = [
    *itertools.product(["lora", "B", "matmul", "vector"], ["bf16", "fp16", "autocast"], [0.01, 0.003]),
    *itertools.product(["constant", "expanded", "B vector", "matmul vector"], ["bf16"], [0.01, 0.003]),
]


def updates(name: str, mode: str, size: float, bias: float | None = None) -> tuple[Tensor, Tensor]:
    """The update that acts, by least squares from the change of the outputs, and the true one of `size` times W0."""
    config = {
        "lora": only(A="lora", init="random"),
        "expanded": only(A="lora", rank=1, init="random"),
        "B": only(B="lora", init="random"),
        "vector": only(A="vector", init="random"),
        "constant": only(A="constant", init="random"),
        "B vector": only(B="vector", init="random"),
        "matmul vector": only(A="vector", product="matmul", init="random"),
        "matmul": only(A="lora", product="matmul", init="random"),
    }[name]
    half = torch.float16 if mode == "fp16" else torch.bfloat16
    layer = nn.Linear(256, 256, bias=bias is not None, dtype=torch.float32 if mode == "autocast" else half)
    if bias is not None:
        nn.init.constant_(layer.bias, bias)
    glora.apply(layer, config=config)
    W0 = layer.parametrizations.weight.original.float()

    def true_update() -> Tensor:
        tensors = glora.state_dict(layer)
        zero = torch.zeros(256, 1)
        scale = tensors.get("A.value", zero).expand(256, 256)
        if "A.left" in tensors:
            scale = tensors["A.left"] @ tensors["A.right"]
        shift = tensors["B.left"] @ tensors["B.right"] if "B.left" in tensors else tensors.get("B.value", zero)
        return (W0 @ scale if name == "matmul" else W0 * scale) + shift

    with torch.no_grad(), internals.force_kernel("expanded" if name == "expanded" else None):
        first = next(glora.parameters(layer))
        first.mul_(size * W0.norm() / true_update().norm())
        x = torch.randn(32768, 256).to(half)
        with torch.autocast("cpu", half) if mode == "autocast" else contextlib.nullcontext():
            y = torch.cat([layer(part) for part in x.split(4096)])
            with glora.disabled(layer):
                base = torch.cat([layer(part) for part in x.split(4096)])
        dW = true_update()
        estimate = torch.linalg.lstsq(x.float(), y.float() - base.float()).solution.T
    return estimate, dW


@pytest.mark.parametrize(("name", "mode", "size"), SURVIVAL)
def test_a_small_update_survives_half_precision(name: str, mode: str, size: float) -> None:
    estimate, dW = updates(name, mode, size)  # invariant 7
    assert (estimate - dW).norm() / dW.norm() <= {0.01: 0.05, 0.003: 0.12}[size]


@pytest.mark.parametrize("size", [0.01, 0.003])
@pytest.mark.parametrize("name", ["lora", "B", "vector"])
@pytest.mark.parametrize("mode", ["bf16", "fp16", "autocast"])
def test_it_survives_beside_a_large_bias(mode: str, name: str, size: float) -> None:
    # The outputs' own rounding, which every layer has, is too coarse for each entry of the update: the share that acts.
    estimate, dW = updates(name, mode, size, bias=2.0)
    assert abs((estimate * dW).sum() / dW.square().sum() - 1) <= {0.01: 0.05, 0.003: 0.12}[size]
