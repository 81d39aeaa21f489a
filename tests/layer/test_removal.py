"""Removal of one layer's adapters, by glora and by torch: merged equals unmerged, and W0 comes back to the bit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import nn
from torch.nn.utils import parametrize

import glora
from tests.helpers.calls import RANDOM, attach, quiet, remove_with_torch
from tests.helpers.marks import examples
from tests.helpers.models import build
from tests.helpers.state import snapshot
from tests.helpers.strategies import Case, cases, close, expected, tally

MERGES: dict[str, Callable[[nn.Module], object]] = {
    "glora.merge": glora.merge,
    "weight, then bias": remove_with_torch,
    "bias, then weight": lambda layer: remove_with_torch(layer, *reversed(list(layer.parametrizations))),
}


@pytest.mark.parametrize("how", MERGES)
@examples(30)
@given(case=cases())
def test_merged_equals_unmerged(case: Case, how: str) -> None:
    layer, x = case.build(), case.input(2, 3)
    weight, bias, y = layer.weight.detach().clone(), layer.bias, layer(x)
    with glora.merged(layer):
        assert type(layer) is nn.Linear
        assert list(layer.state_dict()) == list(case.plain().state_dict()) + ["bias"] * (
            bias is not None and not case.bias
        )
        assert torch.equal(layer.weight, weight)
        assert close(layer(x), y.double(), ulps=16)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), y)
    tally("removal", how)
    MERGES[how](layer)
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, weight)
    assert (layer.bias is None) == (bias is None)
    if bias is not None:
        assert torch.equal(layer.bias, bias)
    assert close(layer(x), y.double(), ulps=16)


@pytest.mark.parametrize("acted", ["all act", "one acts", "none acts"])
@pytest.mark.parametrize("bake", [True, False])
@examples(20)
@given(case=cases(both_tensors=True))
def test_half_removed_still_uses_the_frozen_weight_whatever_acted_and_acts(case: Case, acted: str, bake: bool) -> None:
    layer, plain = case.build(), case.plain()
    assert set(layer.parametrizations) == {"weight", "bias"}
    W0 = plain.weight.detach()
    b0 = torch.zeros(case.out_features) if plain.bias is None else plain.bias.detach()
    last = list(case.named_weights.items())[-1:]
    glora.activate(layer, {"all act": case.named_weights, "one acts": dict(last), "none acts": {}}[acted])
    tally("removal", f"half, {acted}, {'baked in' if bake else 'taken off'}")
    before = copy.deepcopy(layer).double()
    with torch.no_grad():
        weight, _held = layer.weight.clone() if bake else W0, layer.weight
    remove_with_torch(layer, "weight", bake=bake)
    assert torch.equal(layer.weight, weight)
    assert not layer.weight.requires_grad
    # W0 C is kept where there is a C, and torch has written over W0.
    assert bake or not list(layer.buffers())
    assert any(config.C != "none" for config in case.configs) or not list(layer.buffers())
    for now in (case.weights, *([float(i == j) for j in range(len(case.configs))] for i in range(len(case.configs)))):
        then = dataclasses.replace(case, weights=tuple(now))
        there = glora.adapters(layer)  # one of A and B alone is gone
        glora.activate(layer, {name: weight for name, weight in then.named_weights.items() if name in there})
        wanted = expected(before, then, W0, b0)[1]
        for each in (layer, copy.deepcopy(layer)):
            assert close(each.bias, wanted, ulps=64)
        # A frozen W0 C was rounded to the dtype of the factors.
        frozen = [b.dtype for key, b in layer.named_buffers() if key.endswith("C.shift")]
        eps = torch.finfo(frozen[0] if frozen else torch.float64).eps
        moved = copy.deepcopy(layer).double().bias
        assert close(moved, wanted, ulps=64 * eps / torch.finfo(torch.float64).eps)
    bias = layer.bias.detach().clone()
    with quiet():
        glora.merge(layer)
    assert layer.weight.requires_grad
    assert torch.equal(layer.weight, weight)
    # A created bias that nothing acts on is not kept.
    assert not bias.any() if layer.bias is None else torch.equal(layer.bias, bias)


def test_removal_inside_cached_bakes_in_what_it_should_in_either_order() -> None:
    for order in (("weight", "bias"), ("bias", "weight")):
        layer = glora.apply(nn.Linear(4, 3), config=RANDOM)
        weight, bias = layer.weight, layer.bias
        with parametrize.cached():
            layer(torch.randn(2, 4))
            remove_with_torch(layer, *order)
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.bias, bias)


def test_a_half_removed_layer_with_a_prompt_takes_no_second_adapter_and_is_not_saved() -> None:
    # Its C goes by a weight that the layer no longer has: a second adapter would meet two of them, a file neither.
    layer = glora.apply(nn.Linear(4, 3), config=RANDOM, name="a")
    remove_with_torch(layer, "weight")
    bias = layer.bias.detach().clone()
    with pytest.raises(ValueError, match="torch's removal has baked its weight in"):
        glora.apply(layer, lambda *_: True, config=RANDOM, name="b")
    with pytest.raises(RuntimeError, match="torch's removal has baked the weight of '' in"):
        glora.save(layer, "nowhere")
    assert torch.equal(layer.bias, bias)
    remove_with_torch(layer, "bias")
    glora.apply(layer, config=RANDOM, name="b")


@pytest.mark.parametrize("order", [("weight", "bias"), ("bias", "weight")], ids="-".join)
@pytest.mark.parametrize("bake", [True, False])
def test_torchs_own_removal_gives_back_all_but_the_flags(order: tuple[str, str], bake: bool) -> None:
    model = build()
    before = snapshot(model)
    attach(model, targets=["first", "third"])
    for layer in (model.first, model.third):
        remove_with_torch(layer, *order, bake=bake)
    remove_with_torch(model.norm, bake=bake)  # the running statistics
    after = snapshot(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for aspect in ("types", "keys", "identities"):
        assert after[aspect] == before[aspect]
    assert (after["values"] == before["values"]) is not bake
    assert glora.adapters(model) == {}


@pytest.mark.parametrize("C", ["vector", "lora"])
def test_a_frozen_prompt_trains_no_more_and_starts_again_at_zero(C: Any) -> None:
    layer = glora.apply(nn.Linear(4, 3), config=glora.GLoRAConfig.glora(C=C, rank=2, alpha=3.0, init="random"))
    assert any(key.startswith("C.") for key, _ in glora.named_parameters(layer))
    before = layer.bias.detach().clone()
    remove_with_torch(layer, "weight")
    assert torch.equal(layer.bias, before)
    assert not any(key.startswith("C.") for key, _ in glora.named_parameters(layer))
    assert glora.state_dict(layer)["C.shift"].shape == (3,)
    layer(torch.randn(2, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in glora.parameters(layer))
    glora.reset_parameters(layer)
    assert not glora.state_dict(layer)["C.shift"].any()
