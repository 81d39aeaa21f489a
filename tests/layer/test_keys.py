"""Plain keys of the base model, loaded into one adapted layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import glora
from tests.helpers.calls import RANDOM, remove_with_torch


def test_a_plain_bias_alone_is_taken_by_a_load_that_is_not_strict() -> None:
    layer = glora.apply(nn.Linear(4, 3), config=glora.GLoRAConfig.bitfit(init="random"))
    glora.apply(layer, config=glora.GLoRAConfig.glora(init="random"), name="b")
    before = {key: value.clone() for key, value in glora.state_dict(layer, "b").items()}
    layer.load_state_dict({"bias": torch.ones(3)}, strict=False)
    assert torch.equal(glora.base_state_dict(layer)["bias"], torch.ones(3))
    assert all(torch.equal(value, before[key]) for key, value in glora.state_dict(layer, "b").items())


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_frozen_prompt_does_not_go_by_the_layers_weight_after_a_plain_load(assign: bool) -> None:
    layer = glora.apply(nn.Linear(3, 5), config=RANDOM)
    remove_with_torch(layer, "weight")
    layer.load_state_dict({"weight": torch.randn(5, 3), "bias": torch.randn(5)}, assign=assign)
    before = layer.bias.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
    assert torch.equal(layer.bias, before)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_the_plain_weight_of_a_created_bias_is_all_that_a_strict_load_asks_for(assign: bool) -> None:
    config = glora.GLoRAConfig.glora(A="none", B="none", D="none", create_bias=True, init="random")
    layer = glora.apply(nn.Linear(3, 5, bias=False), config=config)
    before = {key: value.clone() for key, value in glora.state_dict(layer).items()}
    weight = torch.randn(5, 3)
    assert layer.load_state_dict({"weight": weight.clone()}, assign=assign) == ([], [])
    assert torch.equal(layer.weight, weight)
    assert all(torch.equal(value, before[key]) for key, value in glora.state_dict(layer).items())
