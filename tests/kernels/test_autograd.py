"""What autograd may ask of a layer, whichever of its tensors ask for a gradient, by whichever kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import glora
from tests.helpers import internals
from tests.helpers.calls import attach, factors_of
from tests.helpers.kernels import KINDS, call_layer
from tests.helpers.strategies import Case, cases, close, tally

kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


@given(cases(dtypes=[torch.float64], max_size=(6, 5)), st.data())
def test_any_tensors_may_ask_for_first_and_second_derivatives(case: Case, data: st.DataObject) -> None:
    layer, x = case.build(), case.input(4)
    tensors = [x, *factors_of(layer)]
    asking = data.draw(st.lists(st.booleans(), min_size=len(tensors), max_size=len(tensors)))
    if data.draw(st.booleans()):  # of the bias alone
        names = [key[0] for name in case.named_weights for key, _ in glora.named_parameters(layer, name)]
        asking = [False, *(name in "CDE" for name in names)]
        tally("asking", "bias paths alone")
    for tensor, ask in zip(tensors, asking, strict=True):
        tensor.requires_grad_(ask)
    sources = [tensor for tensor in tensors if tensor.requires_grad]

    def derivatives(kernel: internals.Kernel | None) -> list[Tensor]:
        with internals.force_kernel(kernel):
            y = call_layer(layer, x)
        assert y.requires_grad == bool(sources)
        if not sources:
            return [y]
        # Through `cos`, so that the second derivatives of the parts of an affine layer are not all zero.
        first = torch.autograd.grad(y.cos().sum(), sources, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), sources, materialize_grads=True)
        return [y, *first, *second]

    assert all(close(a, b, ulps=4000) for a, b in zip(derivatives(None), derivatives("dense"), strict=True))


@kinds
@pytest.mark.parametrize("wrt", ["input", "factors"])
@pytest.mark.parametrize("by", ["torch.autograd", "torch.func"])
def test_vectorised_jacobians_are_those_row_by_row(by: str, wrt: str, config: glora.GLoRAConfig) -> None:
    layer, x = attach(nn.Linear(6, 5), config), torch.randn(7, 6, requires_grad=True)
    sources = [x] if wrt == "input" else factors_of(layer)
    y = layer(x)
    rows = torch.eye(y.numel()).reshape(-1, *y.shape)
    if by == "torch.autograd":
        batched = torch.autograd.grad(y, sources, rows, is_grads_batched=True, retain_graph=True)
    else:
        batched = torch.func.vmap(lambda row: torch.autograd.grad(y, sources, row, retain_graph=True))(rows)
    alone = [torch.autograd.grad(y, sources, row, retain_graph=True) for row in rows]
    for found, wanted in zip(batched, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(wanted))


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


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_frozen_factors_let_the_input_be_written_over(dtype: torch.dtype, config: glora.GLoRAConfig) -> None:
    layer = attach(nn.Linear(6, 6, dtype=dtype), config).requires_grad_(False)
    x = torch.randn(60, 6, dtype=dtype, requires_grad=True)

    def residual(inplace: bool) -> Tensor:
        h = x * 1
        y = layer(h)
        h = h.add_(y) if inplace else h + y
        return torch.autograd.grad(h.float().square().sum(), x)[0]

    assert torch.equal(residual(True), residual(False))


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
