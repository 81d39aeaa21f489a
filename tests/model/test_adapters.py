"""Named adapters: which there are, `activate`, `disabled`, `reset_parameters`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from tests.helpers.calls import RANDOM, attach
from tests.helpers.models import build, three_adapters, two
from tests.helpers.state import same_outputs, unchanged
from tests.helpers.strategies import Case, cases

CALLS: dict[str, Callable[[nn.Module, str | None], object]] = {
    "state_dict": glora.state_dict,
    "load_state_dict": lambda model, name: glora.load_state_dict(model, {}, name),
    "named_parameters": glora.named_parameters,
    "parameters": glora.parameters,
    "reset_parameters": glora.reset_parameters,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_name_means_the_only_adapter_and_an_unknown_one_is_a_key_error(
    call: Callable[[nn.Module, str | None], object],
) -> None:
    model = build()
    with pytest.raises(ValueError, match="only adapter"):
        call(model, None)
    two(model)
    with unchanged(model):
        with pytest.raises(ValueError, match="only adapter.*'a', 'b'"):
            call(model, None)
        with pytest.raises(KeyError, match=r"'c'.*'a', 'b'"):
            call(model, "c")


def test_activate_refuses_what_it_cannot_do() -> None:
    layer = glora.apply(nn.Linear(4, 3), name="a", config=glora.GLoRAConfig.glora())
    with pytest.raises(KeyError, match="'b' is not an adapter of the model, which has 'a'"):
        glora.activate(layer, "b")
    for weight in (float("nan"), float("inf"), True, "1"):
        with pytest.raises(ValueError, match="finite number"):
            glora.activate(layer, {"a": weight})
    assert glora.adapters(layer) == {"a": 1.0}
    assert glora.adapters(glora.activate(layer, {})) == {"a": 0.0}


def test_activate_takes_a_name_or_a_mapping() -> None:
    layer = glora.apply(nn.Linear(4, 3), config=glora.GLoRAConfig.glora())
    for weights in (5, None, ["default"], {"default": 10**400}):
        with pytest.raises(ValueError, match="weight"):
            glora.activate(layer, weights)


@given(cases())
def test_disabled_is_the_base_model_to_the_bit(case: Case) -> None:
    plain, layer, x = case.plain(), case.build(), case.input(4)
    y = layer(x)
    with glora.disabled(layer):
        assert same_outputs(layer(x), plain(x))
        assert set(glora.adapters(layer).values()) == {0.0}
        with glora.merged(layer):
            assert same_outputs(layer(x), plain(x))
            assert (layer.bias is None) == (plain.bias is None)
    assert glora.adapters(layer) == case.named_weights
    assert torch.equal(layer(x), y)


def test_an_adapter_attached_while_disabled_does_not_act_afterwards() -> None:
    layer = glora.apply(nn.Linear(3, 3), config=RANDOM, name="a")
    with glora.disabled(layer):
        glora.apply(layer, config=RANDOM, name="b")
    assert glora.adapters(layer) == {"a": 1.0, "b": 0.0}
    assert not any(p.requires_grad for p in glora.parameters(layer, "b"))


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


def test_resetting_is_seen_under_torchs_cache() -> None:
    model = attach(build(), RANDOM, trainable=["head"])
    with torch.no_grad():
        for parameter in glora.parameters(model):
            parameter.add_(1.0)
    with torch.nn.utils.parametrize.cached():
        weight, bias, head = model.first.weight.clone(), model.first.bias.clone(), model.head.weight.clone()
        glora.reset_parameters(model)
        assert not torch.equal(model.first.weight, weight)
        assert not torch.equal(model.first.bias, bias)
        torch.testing.assert_close(model.head.weight, head - 1.0)
    torch.testing.assert_close(model.head.weight, glora.base_state_dict(model)["head.weight"])


def test_an_unknown_adapter_is_named_without_the_quotes_of_a_key_error() -> None:
    model = glora.apply(nn.Linear(2, 2), name="a", config=glora.GLoRAConfig.glora())
    for call in (
        lambda: glora.activate(model, "x"),
        lambda: glora.delete(model, "x"),
        lambda: glora.state_dict(model, "x"),
        lambda: glora.route(model, ["x"]).__enter__(),
    ):
        with pytest.raises(KeyError) as caught:
            call()
        assert str(caught.value).startswith("'x' is not an adapter of the model, which has 'a'")
