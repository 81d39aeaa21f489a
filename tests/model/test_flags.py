"""Which parameters ask for gradients, while adapters act, rest and are gone: base, factors and heads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from tests.helpers.calls import RANDOM, attach, factors_of, quiet
from tests.helpers.models import build, two_adapters


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
    layer = glora.apply(
        glora.apply(nn.Linear(4, 3), name="a", config=glora.GLoRAConfig.glora()),
        name="b",
        config=glora.GLoRAConfig.glora(),
    )
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


def test_an_adapter_attached_again_under_its_name_begins_anew() -> None:
    model = build()
    attach(model, name="a", trainable=["head"])
    fresh = {key: tensor.requires_grad for key, tensor in glora.named_parameters(model, "a")}
    for parameter in glora.parameters(model, "a"):
        parameter.requires_grad_(False)  # by hand
    attach(model, name="b")
    glora.delete(model, "a")
    attach(model, name="a", trainable=["head"])
    assert {key: tensor.requires_grad for key, tensor in glora.named_parameters(model, "a")} == fresh
    for active in ("b", "a"):
        glora.activate(model, active)
    assert {key: tensor.requires_grad for key, tensor in glora.named_parameters(model, "a")} == fresh


def test_inside_merged_nothing_trains() -> None:
    model = two_adapters()
    with glora.merged(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        y = model(torch.randn(2, 6))
    assert not y.requires_grad
    layer = glora.apply(nn.Linear(4, 3), config=RANDOM, freeze=False)
    with glora.merged(layer):
        assert not layer(torch.randn(2, 4)).requires_grad
    assert all(factor.requires_grad for factor in factors_of(layer))


def test_a_tied_parameters_flag_comes_back_with_either_part() -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
        model[2].weight = model[0].weight
        return glora.apply(model, ["1"], config=glora.GLoRAConfig.glora())

    for part in (0, 2):
        model = tied()
        assert not model[0].weight.requires_grad
        glora.remove(model[part])
        assert model[0].weight.requires_grad
        glora.remove(model)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_bases_head_is_frozen_as_long_as_an_adapter_trains_copies_of_it() -> None:
    def asking(model: nn.Module) -> set[str]:
        base = glora.base_state_dict(model)
        addresses = {p.data_ptr() for p in model.parameters() if p.requires_grad}
        return {key.split(".")[0] for key, tensor in base.items() if tensor.data_ptr() in addresses}

    for names in (["a"], ["b"], ["a", "b"]):
        model = build().requires_grad_(True)
        everything = asking(model)
        attach(model, targets=["first"], name="other", freeze=False)
        assert asking(model) == everything
        for name in names:
            attach(model, targets=["first"], name=name, trainable=["head"], freeze=False)
        for name in names:
            assert asking(model) == everything - {"head"}
            glora.activate(model, "other")
            assert asking(model) == everything - {"head"}
            glora.delete(model, name)
        assert asking(model) == everything
        glora.remove(model)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_deleted_adapters_head_stays_frozen_where_the_rest_is() -> None:
    model = build()
    attach(model, targets=["first"], name="a")
    attach(model, targets=["first"], name="b", trainable=["head"])
    glora.delete(model, "b")
    assert not any(parameter.requires_grad for parameter in model.head.parameters())


def test_a_lazy_layer_that_is_left_out_is_frozen_with_the_rest_and_given_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    glora.apply(model, ["0"], config=glora.GLoRAConfig.glora())
    assert not any(parameter.requires_grad for parameter in model[1].parameters())
    glora.remove(model)
    assert all(parameter.requires_grad for parameter in model[1].parameters())
