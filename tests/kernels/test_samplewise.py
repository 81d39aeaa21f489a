"""Samples of several adapters through one product with W0 (Note [One product for all samples])."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import glora
from tests.helpers import internals
from tests.helpers.calls import RANDOM, attach, factors_of
from tests.helpers.counting import count_products
from tests.helpers.marks import examples
from tests.helpers.strategies import DTYPES, HALF, Case, cases, close

LORA = glora.GLoRAConfig.lora(rank=4, init="random")


def one_after_the_other(layer: nn.Module, x: Tensor, names: list[str | None]) -> Tensor:
    rows: list[Tensor] = []
    for sample, name in zip(x.split(len(x) // len(names)), names, strict=True):
        glora.activate(layer, {} if name is None else name)
        rows.append(layer(sample))
    glora.activate(layer, dict.fromkeys(glora.adapters(layer), 1.0))
    return torch.cat(rows)


def routed(layer: nn.Module, x: Tensor, names: list[str | None], masked: bool, **options: bool) -> Tensor:
    with internals.masked_tokens(10**9 if masked else 0), glora.route(layer, names, **options):
        return layer(x)


@examples(150)
@given(
    cases(dtypes=DTYPES, min_adapters=2),
    st.lists(st.integers(-1, 2), min_size=2, max_size=6),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
def test_each_sample_is_as_with_its_adapter_alone(
    case: Case, choice: list[int], tokens: int, masked: bool, grad: bool
) -> None:
    layer = case.build()
    there = list(glora.adapters(layer))
    names = [None if i < 0 else there[i % len(there)] for i in choice]
    x = case.input(len(names), tokens)
    with torch.set_grad_enabled(grad):
        wanted, found = one_after_the_other(layer, x, names), routed(layer, x, names, masked)
        flat = routed(layer, x.flatten(0, 1), names, masked, flattened=True)
    assert found.dtype == wanted.dtype
    assert close(found, wanted, ulps=8 if case.dtype in HALF else 2000)
    assert close(flat.view_as(found), wanted, ulps=8 if case.dtype in HALF else 2000)


@examples(60)
@given(
    cases(dtypes=[torch.float64], min_adapters=2),
    st.lists(st.integers(-1, 2), min_size=2, max_size=6),
    st.booleans(),
)
def test_gradients_are_the_sums_over_each_adapters_samples(case: Case, choice: list[int], masked: bool) -> None:
    layer = case.build()
    there = list(glora.adapters(layer))
    names = [None if i < 0 else there[i % len(there)] for i in choice]
    x = case.input(len(names), 2).requires_grad_()

    def gradients(y: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        sources = [x, *factors_of(layer)]
        grads = torch.autograd.grad(y, sources, torch.randn_like(y), allow_unused=True)
        return [torch.zeros_like(s) if g is None else g for s, g in zip(sources, grads, strict=True)]

    wanted = gradients(one_after_the_other(layer, x, names))
    torch.testing.assert_close(gradients(routed(layer, x, names, masked)), wanted)


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("config", [LORA, glora.GLoRAConfig.glora(A="vector", init="random"), RANDOM], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_under_autocast_the_result_is_autocasts(half: torch.dtype, config: glora.GLoRAConfig, masked: bool) -> None:
    layer, x, names = nn.Linear(8, 6), torch.randn(3, 2, 8), ["a", None, "b"]
    for name in "ab":
        attach(layer, config, name=name)
    exact = one_after_the_other(layer, x, names)
    with torch.autocast("cpu", half), torch.no_grad():
        found = routed(layer, x, names, masked)
    assert found.dtype == half
    assert close(found, exact, ulps=8)


@pytest.mark.parametrize("adapters", [1, 4, 16])
@pytest.mark.parametrize(
    "form", [LORA, glora.GLoRAConfig.glora(A="vector", C="none", D="none", E="none", rank=4)], ids=str
)
def test_w0_is_multiplied_once_for_the_whole_batch(form: glora.GLoRAConfig, adapters: int) -> None:
    samples, tokens, width, rank = 32, 64, 256, 4
    layer, x = nn.Linear(width, width), torch.randn(samples, tokens, width)
    for number in range(adapters):
        glora.apply(layer, config=form, name=f"a{number}")
    names = [None if i % (adapters + 1) == adapters else f"a{i % (adapters + 1)}" for i in range(samples)]
    with torch.no_grad(), glora.route(layer, names), count_products() as count:
        layer(x)
    product, thin = 2 * samples * tokens * width**2, 2 * samples * tokens * width * rank
    assert count.flops == product + 2 * thin
    assert count.calls == 3


def test_one_token_of_each_sample_needs_no_adapted_weight_for_the_default_forms() -> None:
    layer, x = nn.Linear(64, 64), torch.randn(8, 1, 64)
    for name in "abcd":
        glora.apply(layer, config=glora.GLoRAConfig.glora(C="none", rank=2, init="random"), name=name)
    with torch.no_grad(), glora.route(layer, [*"abcd"] * 2), count_products() as count:
        layer(x)
    copies = 3
    assert count.flops < 1.5 * 2 * 8 * copies * 64**2


def test_what_needs_no_adapted_weight_shares_one_product_beside_what_needs_one() -> None:
    kinds = {"lora": LORA, "ia3": glora.GLoRAConfig.ia3(init="random"), "hira": glora.GLoRAConfig.hira(init="random")}
    layer, names = nn.Linear(128, 128), ["hira", "lora", None, "ia3", "lora", "hira", "ia3", None]
    for name, config in kinds.items():
        glora.apply(layer, config=config, name=name)
    x = torch.randn(len(names), 32, 128)
    with torch.no_grad():
        wanted = one_after_the_other(layer, x, names)
        with glora.route(layer, names), count_products() as count:
            found = layer(x)
    torch.testing.assert_close(found, wanted)
    with torch.no_grad(), glora.route(layer, names[:4] + names[4:] * 2), count_products() as many:
        layer(torch.randn(12, 32, 128))
    assert many.calls == 2 + 3 + 1 + 1  # with many rows each on its own
    assert count.calls == 3 + 2  # x W0^T and B's thin two; W' of hira's and the product with it
