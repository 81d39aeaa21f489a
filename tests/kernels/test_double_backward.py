"""Second derivatives and vectorised first ones, whichever tensors ask for a gradient, by whichever kernel."""

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
from tests.helpers.marks import examples
from tests.helpers.strategies import Case, cases, close, tally

kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


@examples(30)
@given(cases(dtypes=[torch.float64], max_size=(4, 3), max_adapters=2))
def test_double_backward(case: Case) -> None:
    layer, x = case.build(), case.input(3).requires_grad_()
    values = factors_of(layer)
    call_layer(layer, x)

    def function(*tensors: Tensor) -> Tensor:
        return layer(tensors[0])

    assert torch.autograd.gradcheck(function, (x, *values))
    assert torch.autograd.gradgradcheck(function, (x, *values))


def test_double_backward_through_a_layer_used_twice() -> None:
    layer = glora.apply(nn.Linear(3, 3, dtype=torch.float64), config=glora.GLoRAConfig.glora(rank=2, init="random"))
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(layer(x)), (x, *factors_of(layer)))


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
def test_a_gradient_that_is_differentiated_is_the_plain_one_where_inputs_come_from_each_other(
    config: glora.GLoRAConfig,
) -> None:
    # The second call's input comes from the factors too, by the first call: that path is counted once.
    layer, x = attach(nn.Linear(6, 6, dtype=torch.float64), config), torch.randn(4, 6, dtype=torch.float64)
    sources = [x.requires_grad_(), *factors_of(layer)]
    loss = layer(layer(x)).cos().sum()
    plain = torch.autograd.grad(loss, sources, retain_graph=True)
    for found, wanted in zip(torch.autograd.grad(loss, sources, create_graph=True), plain, strict=True):
        torch.testing.assert_close(found, wanted)
