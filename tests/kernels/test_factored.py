"""The one Function of a factored layer: values, gradients of every order, and no more saved than they need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad

import glora
from tests.helpers import internals
from tests.helpers.calls import only
from tests.helpers.counting import count_saved


@st.composite
def arguments(draw: st.DrawFn) -> list[Tensor | None]:
    """x, W0, bias, scale, left, right in float64; all but W0 may ask for a gradient, and right does."""
    torch.manual_seed(draw(st.integers(0, 99)))
    n, o, i, r = (draw(st.integers(1, 4)) for _ in range(4))
    tensors: list[Tensor | None] = [torch.randn(shape).double() for shape in ((n, i), (o, i), o, o, (o, r), (r, i))]
    for position in (2, 3):
        if draw(st.booleans()):
            tensors[position] = None
    for position in (0, 2, 3, 4, 5):
        tensor = tensors[position]
        if tensor is not None:
            tensor.requires_grad_(position == 5 or draw(st.booleans()))
    return tensors


def written_out(x: Any, W0: Any, bias: Any, scale: Any, left: Any, right: Any) -> Tensor:
    W = W0 if scale is None else scale.unsqueeze(1) * W0
    return F.linear(x, W + left @ right, bias)


@given(arguments())
def test_it_is_what_is_written_out_and_so_are_its_gradients(tensors: list[Tensor | None]) -> None:
    sources = [t for t in tensors if t is not None and t.requires_grad]
    ours, theirs = internals.fused(*tensors), written_out(*tensors)
    assert torch.allclose(ours, theirs)
    g = torch.randn(2, *ours.shape).double()
    for mapped in (False, True):
        rows: Any = g if mapped else g[0]
        found = torch.autograd.grad(ours, sources, rows, is_grads_batched=mapped, retain_graph=True)
        wanted = torch.autograd.grad(theirs, sources, rows, is_grads_batched=mapped, retain_graph=True)
        assert all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.autograd.gradgradcheck(
        lambda *given: internals.fused(*_filled(tensors, given)), sources, gen_non_contig_grad_outputs=True
    )


def _filled(tensors: list[Tensor | None], given: tuple[Tensor, ...]) -> list[Tensor | None]:
    rest = iter(given)
    return [next(rest) if t is not None and t.requires_grad else t for t in tensors]


@pytest.mark.parametrize(
    ("scaled", "trained", "kept"),
    [(False, True, 64 * 4), (False, False, 0), (True, True, 64 * 4 + 64 * 32), (True, False, 0)],
)
def test_what_no_gradient_needs_is_not_kept(scaled: bool, trained: bool, kept: int) -> None:
    x, W0, right = torch.randn(64, 16, requires_grad=True), torch.randn(32, 16), torch.randn(4, 16, requires_grad=True)
    left, scale = (torch.randn(shape).requires_grad_(trained) for shape in ((32, 4), (32,)))
    with count_saved([x, W0, left, right, scale]) as saved:
        internals.fused(x, W0, None, scale if scaled else None, left, right)
    assert saved.bytes == 4 * kept


def test_a_backward_pass_under_autocast_or_in_a_dual_level() -> None:
    for dtype, A in ((torch.float32, "vector"), (torch.bfloat16, "none")):
        layer = glora.apply(nn.Linear(6, 5, dtype=dtype), config=only(A=A, B="lora", init="random"))
        x = torch.randn(4, 6, dtype=dtype, requires_grad=True)
        sources = [x, *glora.parameters(layer)]
        wanted = torch.autograd.grad(layer(x).sum(), sources)
        y = layer(x).sum()
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.autograd.grad(y, sources)
        y, tangent = layer(x), torch.randn(4, 5, dtype=dtype)
        with forward_ad.dual_level():
            g = forward_ad.make_dual(torch.ones_like(y), tangent)
            (dual,) = torch.autograd.grad(y, x, g)
            value, derivative = forward_ad.unpack_dual(dual)
        for a, b in zip([*found, value], [*wanted, wanted[0]], strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(derivative, torch.autograd.grad(layer(x), x, tangent)[0])


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("grad", [True, False], ids=["input too", "factors alone"])
def test_the_gradient_of_a_scale_is_as_good_where_the_scale_is_0_or_the_bias_large(mode: str, grad: bool) -> None:
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    layer = glora.apply(nn.Linear(48, 5, dtype=dtype), config=only(A="vector", B="lora", init="random"))
    W0, A = layer.parametrizations.weight.original, glora.state_dict(layer)["A.value"]
    with torch.no_grad():
        A.copy_(torch.tensor([-1, -1 + 1e-6, -1 - 1e-3, 0, 50]).unsqueeze(1))
        layer.bias.fill_(1e3)
    x, g = (torch.randn(64, n).to(torch.float32 if mode == "float32" else torch.bfloat16) for n in (48, 5))
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        y = layer(x.requires_grad_(grad))
    kept = y.detach().clone()
    y.relu_()  # as a module that works in place does; every output is positive
    assert torch.equal(kept, y)
    y.backward(g)
    found = dict[str, Any](glora.named_parameters(layer))["A.value"].grad.double()
    wanted = ((g.double().T @ x.detach().double()) * W0.double()).sum(1, keepdim=True)
    assert ((found - wanted).norm() <= (1e-5 if mode == "float32" else 1e-2) * wanted.norm()).all()


def test_w0_may_change_where_no_gradient_needs_it() -> None:
    layer = glora.apply(nn.Linear(6, 5), config=only(B="lora", init="random"))
    y = layer(torch.randn(4, 6)).sum()
    with torch.no_grad():
        layer.parametrizations.weight.original.zero_()
    y.backward()
