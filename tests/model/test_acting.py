"""Which adapters act, and whose parameters ask for gradients: by weight, by name, from files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from tests.helpers.calls import RANDOM, attach, factors_of
from tests.helpers.models import build, three_adapters, two_adapters
from tests.helpers.state import unchanged
from tests.helpers.strategies import Case, cases


@given(cases(min_adapters=2), st.data())
def test_an_adapter_of_weight_0_is_not_there_at_all(case: Case, data: st.DataObject) -> None:
    layer, x, names = case.build(), case.input(), list(case.named_weights)
    acting = data.draw(st.lists(st.sampled_from(names), max_size=len(names) - 1, unique=True))
    zero = data.draw(st.sampled_from([0, 0.0, -0.0]))
    weights = {name: case.named_weights[name] if name in acting else zero for name in names}
    glora.activate(layer, {name: weight for name, weight in weights.items() if name in acting})
    wanted = layer(x)
    glora.activate(layer, weights)
    for name in set(names) - set(acting):
        assert not any(parameter.requires_grad for parameter in glora.parameters(layer, name))
        for tensor in glora.state_dict(layer, name).values():
            tensor.fill_(float("inf"))  # 0 * inf is no 0
    assert torch.equal(layer(x), wanted)
    assert glora.adapters(layer) == weights
    for name in acting:
        assert all(parameter.requires_grad for parameter in glora.parameters(layer, name))


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


@pytest.mark.parametrize("weights", [{"a": 0.5, "c": 0.5}, {"c": 1.0, "a": 1.0}, {"a": 1, "b": 1, "c": -1}])
def test_a_head_and_an_adapter_that_lacks_it_do_not_combine(weights: dict[str, float]) -> None:
    model = three_adapters()
    with unchanged(model), pytest.raises(ValueError, match="Heads do not add up"):
        glora.activate(model, weights)
    assert glora.adapters(glora.activate(model, dict.fromkeys(weights, 0) | {"a": 1.0}))["a"] == 1.0


@pytest.mark.parametrize("trainable", [True, False])
def test_a_loaded_adapter_trains_with_its_heads_or_not_at_all(trainable: bool, tmp_path: Path) -> None:
    source = build()
    other = copy.deepcopy(source)
    attach(source, trainable=["head", "norm"])
    glora.save(source, tmp_path)
    model = glora.load(other, tmp_path, trainable=trainable)
    asking = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert asking == ({id(parameter) for parameter in glora.parameters(model)} if trainable else set())
    glora.activate(glora.activate(model, {}), "default")
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == asking


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
        return glora.apply(model, ["1"])

    for part in (0, 2):
        model = tied()
        assert not model[0].weight.requires_grad
        glora.remove(model[part])
        assert model[0].weight.requires_grad
        glora.remove(model)
        assert all(parameter.requires_grad for parameter in model.parameters())
