"""A layer that is plain for a while, and restored."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import glora
from tests.helpers.calls import RANDOM
from tests.helpers.models import adapted_block


def test_merged_leaves_a_pending_backward_alone() -> None:
    layer = glora.apply(nn.Linear(4, 3), config=glora.GLoRAConfig.glora(init="random"))
    loss = layer(torch.randn(5, 4)).square().sum()
    (reference,) = torch.autograd.grad(loss, [next(glora.parameters(layer))], retain_graph=True)
    with glora.merged(layer):
        pass
    with glora.disabled(layer):
        loss.backward()  # a backward pass inside reaches the factors
    assert torch.equal(next(glora.parameters(layer)).grad, reference)


def test_what_merged_computes_is_given_back_after_an_exception_and_where_the_model_was_moved() -> None:
    layer = glora.apply(nn.Linear(4, 3), config=glora.GLoRAConfig.glora(init="random"))
    before = {key: (value, value.clone()) for key, value in layer.state_dict(keep_vars=True).items()}
    with pytest.raises(ZeroDivisionError), glora.disabled(layer), glora.merged(layer), glora.merged(layer):
        _ = 1 / 0
    after = layer.state_dict(keep_vars=True)
    assert all(after[key] is value and torch.equal(value, bits) for key, (value, bits) in before.items())
    with glora.merged(layer):
        layer.double()
    assert {value.dtype for value in layer.state_dict().values()} == {torch.float64}


def test_a_garbage_collection_inside_merged_does_no_harm() -> None:
    class Lonely(nn.Linear):
        pass

    layer = glora.apply(Lonely(4, 3), config=RANDOM)
    weight = layer.weight
    with glora.merged(layer):
        gc.collect()
    assert torch.equal(layer.weight, weight)


def test_a_conversion_inside_merged_inside_disabled_reaches_everything() -> None:
    model = adapted_block()
    with glora.disabled(model), glora.merged(model):
        model.double()
    assert model(torch.randn(2, 6).double()).dtype == torch.float64


def test_what_is_merged_for_a_while_trains_nothing_and_keeps_the_mode_it_was_set_to() -> None:
    layer = glora.apply(nn.Linear(4, 3), config=glora.GLoRAConfig.glora(rank_dropout=0.5)).train()
    with glora.merged(layer):
        assert not any(p.requires_grad for p in layer.parameters())
        layer.eval()
    assert not any(module.training for module in layer.modules())
    with glora.merged(layer):
        layer.train()
    assert all(module.training for module in layer.modules())
