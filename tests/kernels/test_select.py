"""Which kernel a layer takes; and that each is the dense formula, in values, gradients and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from tests.helpers import internals, reference
from tests.helpers.calls import RANDOM, attach, factors_of, only
from tests.helpers.kernels import KINDS, run_kernel
from tests.helpers.marks import examples
from tests.helpers.strategies import cases, close, expected


def test_the_choice_goes_by_the_forms_the_tokens_and_the_gradient() -> None:
    def chosen(config: glora.GLoRAConfig, tokens: int, grad: bool) -> internals.Kernel | None:
        layer = glora.apply(nn.Linear(8, 8), config=config)
        return internals.chosen_kernel(layer, tokens, grad)

    low = only(A="lora", rank=3)
    assert chosen(low, 1, True) == "blockwise"
    assert chosen(low, 1, False) == "expanded"
    assert chosen(low, 10_000, False) == "blockwise"
    assert chosen(only(A="lora", product="matmul"), 10_000, True) == "factored"
    assert chosen(only(A="vector", B="lora"), 1, False) == "factored"
    with internals.force_kernel("dense"):
        assert chosen(low, 1, False) == "dense"


def test_a_base_that_is_not_frozen_trains_too() -> None:
    layer = glora.apply(nn.Linear(3, 2), config=RANDOM, freeze=False)
    layer(torch.randn(4, 3)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_forcing_a_kernel_inside_another_ends_with_its_own_block() -> None:
    layer, x = attach(nn.Linear(6, 5), KINDS["lora"]), torch.randn(4, 6)
    with internals.kernels_taken() as taken:
        for kernel in ("dense", "blockwise"):
            with internals.force_kernel("dense"):
                with internals.force_kernel("blockwise" if kernel == "dense" else None):
                    layer(x)
                layer(x)
            layer(x)
    assert taken == ["blockwise", "dense", "blockwise"] * 2


SHAPES = [(5,), (2, 3), (1, 2, 2), (0,), (1,), (), (40, 3)]


@pytest.mark.parametrize("kernel", ["factored", "blockwise"])
@examples(100)
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
@examples(100)
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


kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


@kinds
@pytest.mark.parametrize("grad", [True, False])
def test_jagged_tensors_go_through_as_through_a_plain_layer(grad: bool, config: glora.GLoRAConfig) -> None:
    layer = attach(nn.Linear(6, 5), config)
    parts = [torch.randn(3, 6), torch.randn(4, 6)]
    with torch.set_grad_enabled(grad):
        y = layer(torch.nested.nested_tensor(parts, layout=torch.jagged))
        wanted = [layer(part) for part in parts]
    for found, part in zip(y.unbind(), wanted, strict=True):
        torch.testing.assert_close(found, part)
    if grad:
        factors = factors_of(layer)
        found = torch.autograd.grad(y.values().square().sum(), factors)
        sums = torch.autograd.grad(torch.cat(wanted).square().sum(), factors)
        for a, b in zip(found, sums, strict=True):
            torch.testing.assert_close(a, b)
