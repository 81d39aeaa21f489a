"""Derivatives through a layer by torch.func, compiled and checkpointed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import glora
from tests.helpers import internals
from tests.helpers.calls import factors_of
from tests.helpers.kernels import KINDS, run_kernel
from tests.helpers.marks import long


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("kernel", "block"), [(None, 2**21), (None, 11), long("dense", 2**21)])
@pytest.mark.parametrize("tokens", [1, 60])
def test_compiled_without_a_break_and_equal(tokens: int, kernel: Any, block: int, name: str) -> None:
    torch._dynamo.reset()
    layer = glora.apply(nn.Linear(6, 5), config=KINDS[name])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for grad in (True, False):
        x = torch.randn(tokens, 6, requires_grad=True)
        with internals.entries_of_a_block(block):
            for a, b in zip(run_kernel(compiled, x, kernel, grad), run_kernel(layer, x, kernel, grad), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", KINDS)
def test_torch_func_transforms_inside_of_what_is_compiled(name: str) -> None:
    torch._dynamo.reset()
    layer, x = glora.apply(nn.Linear(6, 5), config=KINDS[name]), torch.randn(3, 6)

    def call(x: Tensor) -> Tensor:
        return layer(x)

    def tangent(x: Tensor) -> Tensor:
        return torch.func.jvp(call, (x,), (x,))[1]

    for function in (torch.func.vmap(call), torch.func.vmap(torch.func.jacrev(call)), tangent):
        torch.testing.assert_close(torch.compile(function, backend="aot_eager")(x), function(x))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_checkpointing_gives_equal_gradients_also_with_rank_dropout(name: str, p: float) -> None:
    forms_of = {**KINDS[name].forms, "product": KINDS[name].product}
    layer = glora.apply(
        nn.Linear(6, 5), config=glora.GLoRAConfig.glora(**forms_of, init="random", rank=4, rank_dropout=p)
    )
    x = torch.randn(7, 6, requires_grad=True)
    grads = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(call(x).square().sum(), [x, *factors_of(layer)]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_torch_func_transforms(name: str) -> None:
    layer, x = glora.apply(nn.Linear(6, 5, dtype=torch.float64), config=KINDS[name]), torch.randn(3, 6).double()
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    jacobian = torch.func.vmap(torch.func.jacrev(layer))(x)
    torch.testing.assert_close(jacobian, layer.weight.expand(3, -1, -1))
    tangent = torch.func.jvp(layer, (x,), (x,))[1]
    torch.testing.assert_close(tangent, x @ layer.weight.T)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent, x @ layer.weight.T)
