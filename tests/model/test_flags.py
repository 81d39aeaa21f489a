"""Which parameters ask for gradients, while adapters are there and after them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from tests.helpers.calls import RANDOM, attach, quiet
from tests.helpers.models import build


@pytest.mark.parametrize("finish", [glora.merge, glora.remove])
@given(bits=st.lists(st.booleans(), min_size=11, max_size=11), freeze=st.booleans(), again=st.booleans())
def test_flags_are_as_before_the_first_apply(
    finish: Callable[[nn.Module], nn.Module], bits: list[bool], freeze: bool, again: bool
) -> None:
    model = build()
    for parameter, bit in zip(model.parameters(), bits, strict=True):
        parameter.requires_grad_(bit)
    attach(model, freeze=freeze, trainable=["head"])
    if freeze:
        assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == {
            key for key, _ in model.named_parameters() if "default" in key
        }
    if again:
        attach(model, name="again", trainable=["norm"], targets=["first", "third"])
        glora.activate(model, {"default": 1.0} if finish is glora.merge else {})
    with quiet():
        finish(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == bits


@pytest.mark.parametrize("finish", [glora.merge, glora.remove])
def test_a_flag_that_was_changed_by_hand_since_stays(finish: Callable[[nn.Module], nn.Module]) -> None:
    model = build()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.first.weight.requires_grad_(False)
    attach(model)
    assert not model.embed.weight.requires_grad
    model.embed.weight.requires_grad_(True)
    model.norm.bias.requires_grad_(True)  # as it was before: given back either way
    model.first.parametrizations.weight.original.requires_grad_(True)
    finish(model)
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert after == before | {"embed.weight": True, "first.weight": True}


def test_only_active_factors_ask_for_gradients_and_flags_come_back() -> None:
    layer = glora.apply(glora.apply(nn.Linear(4, 3), name="a"), name="b")
    frozen = next(glora.parameters(layer, "b"))
    frozen.requires_grad_(False)  # by hand
    glora.activate(layer, "a")
    assert all(p.requires_grad for p in glora.parameters(layer, "a"))
    assert not any(p.requires_grad for p in glora.parameters(layer, "b"))
    glora.activate(layer, {"a": 0.5, "b": 0.5})
    assert all(p.requires_grad for p in glora.parameters(layer, "a"))
    assert [p.requires_grad for p in glora.parameters(layer, "b")] == [
        p is not frozen for p in glora.parameters(layer, "b")
    ]
    glora.activate(layer, {})
    assert not any(p.requires_grad for p in layer.parameters())


def test_freezing_reaches_what_others_parametrize() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Flatten(), nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(model[0])
    glora.apply(model, ["2"], config=RANDOM)
    assert not any(p.requires_grad for p in model[0].parameters())
    glora.remove(model)
    assert all(p.requires_grad for p in model.parameters())
