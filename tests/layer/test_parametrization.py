"""W' and b' of one layer against the reference: any adapters, weights, dtypes; their derivatives."""

from __future__ import annotations

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import glora
from tests.helpers.strategies import DTYPES, Case, cases, close, configs, expected


@given(cases())
def test_weight_and_bias_are_the_reference(case: Case) -> None:
    plain, layer = case.plain(), case.build()
    weight, bias = expected(layer, case, plain.weight.detach(), None if plain.bias is None else plain.bias.detach())
    assert layer.weight.dtype == case.dtype
    # Differences of the order of summation, at the size of the largest entry.
    assert close(layer.weight, weight, ulps=64)
    if layer.bias is not None:
        assert close(layer.bias, bias, ulps=64)
    else:
        assert not case.bias


@given(cases(min_adapters=2), st.randoms(use_true_random=False))
def test_adapters_add_up_in_any_order(case: Case, random: object) -> None:
    layer = case.build()
    weight = layer.weight.detach().clone()
    names = list(case.named_weights)
    random.shuffle(names)
    glora.activate(layer, {name: case.named_weights[name] for name in names})
    assert close(layer.weight, weight.double(), ulps=32)


@given(configs(), st.sampled_from(DTYPES))
def test_opposite_weights_of_equal_adapters_give_the_base(config: glora.GLoRAConfig, dtype: torch.dtype) -> None:
    plain = nn.Linear(9, 6, dtype=dtype)
    layer = glora.apply(glora.apply(copy.deepcopy(plain), config=config, name="a"), config=config, name="b")
    glora.load_state_dict(layer, glora.state_dict(layer, "a"), "b")
    glora.activate(layer, {"a": 1, "b": -1})
    assert close(layer.weight, plain.weight.double(), ulps=4)
    assert close(layer.bias, plain.bias.double(), ulps=4)


@given(cases(dtypes=[torch.float64]))
def test_weights_are_those_of_activate_and_half_of_them_half_the_update(case: Case) -> None:
    layer = case.build()
    assert glora.adapters(layer) == case.named_weights
    W0 = case.plain().weight
    whole = layer.weight - W0
    glora.activate(layer, {name: weight / 2 for name, weight in case.named_weights.items()})
    assert close(2 * (layer.weight - W0), whole, ulps=64)


@given(cases(dtypes=[torch.float32, torch.bfloat16, torch.float16]), st.sampled_from([torch.bfloat16, torch.float16]))
def test_dtypes_are_the_layers_also_inside_autocast(case: Case, half: torch.dtype) -> None:
    plain, layer, x = case.plain(), case.build(), case.input(4)
    weight = layer.weight
    for parameter in (p for name in case.named_weights for p in glora.parameters(layer, name)):
        assert parameter.dtype == torch.float32
    with torch.autocast("cpu", half):
        assert layer.weight.dtype == case.dtype
        assert torch.equal(layer.weight, weight)
        assert layer(x).dtype == plain(x).dtype
    assert layer(x).dtype == case.dtype


@given(cases(dtypes=[torch.float64], max_size=(5, 4)))
def test_gradients_of_every_factor(case: Case) -> None:
    layer, x = case.build(), case.input(3).requires_grad_()
    names = [(adapter, key) for adapter in case.named_weights for key, _ in glora.named_parameters(layer, adapter)]
    values = [p for adapter in case.named_weights for _, p in glora.named_parameters(layer, adapter)]
    prefix = {"A": "weight", "B": "weight", "C": "bias", "D": "bias", "E": "bias"}
    own = [f"parametrizations.{prefix[key[0]]}.0.{adapter}.{key}" for adapter, key in names]

    def function(x: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(own, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *values))
    arguments = (x.detach(), *(v.detach() for v in values))
    tangents = tuple(torch.randn_like(a) for a in arguments)
    forward = torch.func.jvp(function, arguments, tangents)[1]
    reverse = torch.func.jacrev(function, tuple(range(len(arguments))))(*arguments)
    along = sum((J.flatten(2) @ t.flatten() for J, t in zip(reverse, tangents, strict=True)), torch.zeros_like(forward))
    torch.testing.assert_close(forward, along)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))


def test_a_printed_layer_shows_each_factors_shape_and_scale_and_which_adapters_act() -> None:
    layer: nn.Module = nn.Linear(4, 3)
    for name in ("a", "b"):
        glora.apply(layer, config=glora.GLoRAConfig.glora(A="vector", rank=2, alpha=3.0), name=name)
    glora.activate(layer, {"a": 0.5, "b": -2.0})
    text = str(layer)
    assert "(A): Vector(value=(3, 1))" in text
    assert "(B): LowRank(left=(3, 2), right=(2, 4), scale=1.5)" in text
    assert "a=0.5, b=-2\n" in text
    glora.activate(layer, {})
    assert str(layer).count("none acts\n") == 2
