"""Adapters put on a tensor and taken off again: W0 comes back to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from tests.helpers.calls import attach, remove_with_torch
from tests.helpers.strategies import cases, tally


def test_a_tensor_that_no_path_touches_is_not_parametrized() -> None:
    assert list(glora.apply(nn.Linear(3, 3), config=glora.GLoRAConfig.lora()).parametrizations) == ["weight"]
    assert list(glora.apply(nn.Linear(3, 3), config=glora.GLoRAConfig.bitfit()).parametrizations) == ["bias"]


REMOVALS: dict[str, tuple[bool | None, Callable[[nn.Module], object]]] = {
    # Torch's removal keeps a created bias.
    "torch's": (False, lambda layer: remove_with_torch(layer, bake=False)),
    "glora.remove": (None, glora.remove),
}


@pytest.mark.parametrize("how", REMOVALS)
@given(data=st.data())
def test_removal_gives_back_the_very_bits(data: st.DataObject, how: str) -> None:
    create_bias, remove = REMOVALS[how]
    tally("removal", how)
    case = data.draw(cases(create_bias=create_bias))
    layer = case.plain()
    before = dict(layer.named_parameters())
    bits = {name: parameter.detach().clone() for name, parameter in before.items()}
    for i, config in enumerate(case.configs):
        attach(layer, config, name=f"a{i}")
    layer(case.input())
    remove(layer)
    assert type(layer) is nn.Linear
    assert dict(layer.named_parameters()).keys() == before.keys()
    for name, parameter in layer.named_parameters():
        assert parameter is before[name]
        assert torch.equal(parameter, bits[name])
    assert list(layer.state_dict()) == list(bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_thousand_rounds_leave_every_bit(dtype: torch.dtype) -> None:
    plain = nn.Linear(7, 5, dtype=dtype)
    layer = glora.apply(copy.deepcopy(plain), config=glora.GLoRAConfig.glora(A="vector", B="lora", init="random"))
    with torch.no_grad():
        dict(glora.named_parameters(layer))["A.value"].fill_(-1)  # W0 vanishes from W'
    x = torch.randn(3, 7, dtype=dtype)
    y = layer(x)
    for _ in range(1000):
        with glora.disabled(layer), glora.merged(layer):
            pass
        with glora.merged(layer):
            pass
    assert torch.equal(layer(x), y)
    with glora.disabled(layer):
        assert torch.equal(layer(x), plain(x))
    glora.remove(layer)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)
