"""Which adapter a checkpoint holds, only where nothing else trains; it comes back under its own description."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from glora import AdapterFileError, GLoRAConfig
from glora.integrations.active import active_adapter, restore
from glora.model.state import describe
from tests.helpers.calls import attach
from tests.helpers.strategies import configs


def adapted() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6))
    return glora.apply(
        glora.apply(model, name="a", config=glora.GLoRAConfig.glora()), name="b", config=glora.GLoRAConfig.glora()
    )


def test_it_is_the_only_active_one() -> None:
    model = adapted()
    assert active_adapter(model) == "b"
    assert active_adapter(glora.activate(model, {"a": 0.5})) == "a"


def test_none_and_several_are_refused() -> None:
    model = adapted()
    for weights, found in (({}, "none"), ({"a": 1.0, "b": 1.0}, "'a', 'b'")):
        with pytest.raises(ValueError, match=f"holds the one that acts; found {found}"):
            active_adapter(glora.activate(model, weights))


def test_another_parameter_that_trains_is_refused_by_name() -> None:
    model = adapted()
    model.get_submodule("1").weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"everything that trains; 1\.weight are no part of 'b'"):
        active_adapter(model)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[GLoRAConfig, GLoRAConfig]:
    """Two configs of tensors with the same keys and shapes."""
    first = draw(configs(create_bias=False))
    alpha, product = draw(st.sampled_from([None, 1.0, 6.0])), draw(st.sampled_from(["hadamard", "matmul"]))
    return first, replace(first, alpha=alpha, product=product, init=draw(st.sampled_from(["identity", "random"])))


@given(pairs())
def test_restored_tensors_are_the_same_function_or_refused(both: tuple[GLoRAConfig, GLoRAConfig]) -> None:
    base = nn.Linear(5, 5)
    trained, attached = (attach(copy.deepcopy(base), config) for config in both)
    before = {key: tensor.clone() for key, tensor in glora.state_dict(attached).items()}
    refused = ""
    try:
        restore(attached, describe(trained), "the checkpoint")
    except AdapterFileError as error:
        refused = str(error)
    if refused:
        here, there = (
            attached.parametrizations.weight[0].default.config,
            trained.parametrizations.weight[0].default.config,
        )
        assert f"is {here} in the model and {there} in the file" in refused
        assert all(torch.equal(before[key], tensor) for key, tensor in glora.state_dict(attached).items())
        first, second = both
        assert (first.alpha or first.rank, first.product) != (second.alpha or second.rank, second.product)
    else:
        torch.testing.assert_close(attached.weight, trained.weight)
        torch.testing.assert_close(attached.bias, trained.bias)


def test_other_layers_and_heads_are_refused_and_another_base_is_named() -> None:
    def model(**arguments: object) -> nn.Module:
        torch.manual_seed(0)
        return attach(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), **arguments)

    spec = describe(model(targets=["0"], trainable=["1"]))
    for other in (model(targets=["0"]), model(), model(targets=["0", "1"])):
        with pytest.raises(AdapterFileError, match="Nothing was changed"):
            restore(other, spec, "the checkpoint")
    same = model(targets=["0"], trainable=["1"])
    restore(same, spec, "the checkpoint")
    same.get_submodule("0.parametrizations.weight").original.data.mul_(2)
    with pytest.warns(UserWarning, match="the checkpoint was trained beside others than this base has in 0.weight"):
        restore(same, spec, "the checkpoint")
