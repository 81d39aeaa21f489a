"""Attaching a supernet and switching it: kernels, costs, compiled code, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import glora
from glora import GLoRAConfig
from glora.search import Space, choose, spaces
from tests.helpers.calls import RANDOM, attach, warned
from tests.helpers.counting import count_products
from tests.helpers.internals import chosen_kernel
from tests.helpers.search import any_choice, block, supernet

LORA = GLoRAConfig.lora(rank=2)


def test_a_start_that_changes_nothing_in_any_choice() -> None:
    model, x = block(), torch.randn(3, 6)
    y = model(x)
    glora.search.supernet(model, "all-linear", Space())
    for seed in range(5):
        assert torch.allclose(choose(model, any_choice(model, seed))(x), y)


def test_one_set_of_tensors_for_all_forms() -> None:
    model = glora.search.supernet(block(), "all-linear", Space(ranks=[2, 4]))
    largest = glora.plan(block(), config=Space(ranks=[2, 4]).largest)
    assert sum(p.numel() for p in glora.parameters(model)) == largest.parameters


def test_a_choice_without_an_elementwise_low_rank_A_goes_the_cheap_way() -> None:
    layer = supernet(nn.Linear(64, 64))
    assert chosen_kernel(layer, 8, True) == "blockwise"
    choose(layer, {"": Space().config({"A": "vector", "B": "lora"}, 2)})
    assert chosen_kernel(layer, 8, True) == "factored"
    with count_products() as count:
        layer(torch.randn(128, 64)).sum().backward()
    assert count.flops < 1.2 * 2 * 2 * 128 * 64 * 64  # x asks for no gradient: the forward's product, and thin ones


def test_a_supernet_beside_another_adapter_and_head() -> None:
    model, x = attach(block(), RANDOM, name="other"), torch.randn(3, 6)
    other = model(x)
    supernet(model, targets=["0"], name="net")
    assert glora.adapters(model) == {"other": 0.0, "net": 1.0}
    assert list(spaces(model)) == ["0"]
    glora.activate(model, "other")
    assert torch.equal(choose(model, {"0": LORA})(x), other)


def test_a_layer_in_which_nothing_is_drawn_is_named() -> None:
    model = nn.MultiheadAttention(4, 2)
    messages = warned(lambda: glora.search.supernet(model, ["out_proj"], Space()))
    assert len(messages) == 1
    assert "out_proj" in messages[0]


def test_wrong_states_are_refused() -> None:
    with pytest.raises(ValueError, match="must have one supernet; found none"):
        choose(attach(block()), None)
    model = supernet(supernet(block(), name="a"), name="b")
    with pytest.raises(ValueError, match="found a, b|found b, a"):
        choose(model, None)
    with glora.merged(model), pytest.raises(RuntimeError, match=r"Inside glora\.merged"):
        choose(model, None)
    with pytest.raises(ValueError, match=r"must be a glora\.search\.Space"):
        glora.search.supernet(block(), "all-linear", LORA)


def test_an_embedding_draws_and_is_not_named() -> None:
    model = nn.Sequential(nn.Embedding(6, 4))
    assert not [
        m
        for m in warned(lambda: glora.search.supernet(model, ["0"], Space(C=["none"], D=["none"], E=["none"])))
        if "draw" in m
    ]
    with torch.no_grad():
        for parameter in glora.parameters(model):
            parameter.copy_(torch.randn_like(parameter))
    assert len({model(torch.arange(6)).sum().item() for _ in range(20)}) > 1
