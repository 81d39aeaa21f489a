"""The terms of several adapters are the dense formula, whatever their forms."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import glora
from tests.helpers import internals
from tests.helpers.calls import attach, factors_of, only
from tests.helpers.counting import count_products
from tests.helpers.strategies import Case, cases, close, expected


def matrix(pair: tuple[Tensor, Tensor] | None) -> Tensor | float:
    return 0.0 if pair is None else pair[0] @ pair[1]


def weight(W0: Tensor, terms: internals.Terms) -> Tensor:
    """W' as the terms say."""
    outputs = 0.0 if terms.outputs is None else terms.outputs.unsqueeze(1)
    inputs = 0.0 if terms.inputs is None else terms.inputs
    return W0 * (1 + outputs + inputs + matrix(terms.entries)) + matrix(terms.shift)


def tensors(terms: internals.Terms) -> list[Tensor]:
    pairs = [factor for pair in (terms.entries, terms.shift) if pair is not None for factor in pair]
    return [*(vector for vector in (terms.outputs, terms.inputs) if vector is not None), *pairs]


@given(cases())
def test_they_are_the_dense_formula_in_single_precision_at_least(case: Case) -> None:
    layer, plain = case.build(), case.plain()
    W0, terms = plain.weight.detach(), internals.terms_of_layer(layer)
    wanted, _ = expected(layer, case, W0, None if plain.bias is None else plain.bias.detach())
    dtype = torch.promote_types(case.dtype, torch.float32)
    assert {tensor.dtype for tensor in tensors(terms)} <= {dtype}
    assert close(weight(W0.to(dtype), terms), wanted, ulps=2000)


@given(cases(dtypes=[torch.float64]))
def test_their_gradients_are_the_dense_formulas(case: Case) -> None:
    layer = case.build()
    factors = [p for p, key in zip(factors_of(layer), keys_of(layer), strict=True) if key[0] in "AB"]
    W = layer.weight
    W0, g = layer.parametrizations.weight.original, torch.randn_like(W)
    for terms in (internals.terms_of_layer(layer), as_one(internals.terms_of_layer(layer))):
        found = torch.autograd.grad(weight(W0, terms), factors, g)
        wanted = torch.autograd.grad(W, factors, g, retain_graph=True)
        assert all(close(a, b, ulps=2000) for a, b in zip(found, wanted, strict=True))


def keys_of(layer: nn.Module) -> list[str]:
    return [key for name in glora.adapters(layer) for key, _ in glora.named_parameters(layer, name)]


def as_one(terms: internals.Terms) -> internals.Terms:
    """The same with all that scales as one pair, where there is a pair among it."""
    entries = terms.as_entries()
    return terms if entries is None else internals.Terms(None, None, entries, terms.shift)


@given(cases(), st.booleans())
def test_each_form_is_in_its_own_term(case: Case, matmul: bool) -> None:
    product = "matmul" if matmul else "hadamard"
    case = replace(case, configs=tuple(replace(config, product=product) for config in case.configs))
    terms = internals.terms_of_layer(case.build())
    A, B = {config.A for config in case.configs}, {config.B for config in case.configs}
    assert (terms.outputs is not None) == ("constant" in A or ("vector" in A and not matmul))
    assert (terms.inputs is not None) == ("vector" in A and matmul)
    assert (terms.entries is not None) == ("lora" in A and not matmul)
    assert (terms.shift is not None) == (bool(B - {"none"}) or ("lora" in A and matmul))
    assert (terms.as_entries() is None) == (terms.entries is None)


def test_one_adapters_pair_is_not_copied_and_w0_is_multiplied_by_thin_factors_alone() -> None:
    layer = attach(nn.Linear(64, 48), only(A="lora", B="lora", rank=4))
    terms = internals.terms_of_layer(layer)
    for pair, path in ((terms.entries, "A"), (terms.shift, "B")):
        assert pair is not None
        assert pair[1] is dict(glora.named_parameters(layer))[f"{path}.right"]
    layer = attach(nn.Linear(64, 48), only(A="lora", product="matmul", rank=4))
    with count_products() as count:
        internals.terms_of_layer(layer)
    assert count.flops == 2 * 48 * 64 * 4


def test_half_precision_does_not_overflow_in_a_thin_product() -> None:
    layer = attach(
        nn.Linear(64, 48, bias=False, dtype=torch.float16), only(A="lora", product="matmul", rank=4, init="random")
    )
    factors = dict(glora.named_parameters(layer))
    with torch.no_grad():
        factors["A.left"].mul_(1e7)
        factors["A.right"].div_(1e7)
    W = weight(layer.parametrizations.weight.original, internals.terms_of_layer(layer))
    assert close(layer(torch.eye(64).half()).T, W.detach())
