"""What holds for each module on its own, where modules differ in the adapters that they have or that act."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import glora
from tests.helpers.calls import RANDOM, attach


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def test_deleting_an_adapter_leaves_what_acts_in_each_module() -> None:
    model, x = two_layers(), torch.randn(2, 4)
    for name in "abc":
        glora.apply(model, config=RANDOM, name=name)
    glora.activate(model[0], "a")
    glora.activate(model[1], "b")
    y = model(x)
    glora.delete(model, "c")
    assert torch.equal(model(x), y)
    glora.delete(model, "b")
    assert glora.adapters(model[0]) == {"a": 1.0}
    assert glora.adapters(model[1]) == {"a": 0.0}


def test_a_layer_whose_adapter_is_deleted_goes_on_without_it() -> None:
    model, base = attach(two_layers(), RANDOM, name="a"), None
    with glora.disabled(model):
        base = model[0].weight.detach().clone()
    glora.apply(model[0], config=RANDOM, name="b")
    glora.delete(model, "b")
    assert torch.equal(model[0].weight, base)


def test_a_merge_warns_of_an_adapter_that_is_dropped_in_one_module() -> None:
    model = glora.apply(two_layers(), config=RANDOM, name="a")
    glora.activate(model[0], {})
    with pytest.warns(UserWarning, match="dropped: 'a'"):
        glora.merge(model)


def test_a_summary_has_a_row_for_each_adapter_of_the_module_itself() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale

    model = nn.Sequential(nn.Linear(4, 4), Head())
    glora.apply(model, ["0"], trainable=["1"], name="a", config=glora.GLoRAConfig.glora())
    glora.apply(model, ["0"], trainable=["1.inner"], name="b", config=glora.GLoRAConfig.glora())
    assert [(row.path, row.adapter) for row in glora.summary(model).rows] == [
        ("0", "a"),
        ("0", "b"),
        ("1", "a"),
        ("1.inner", "a"),
        ("1.inner", "b"),
    ]


def test_a_frozen_prompt_goes_with_its_adapter() -> None:
    layer = glora.apply(nn.Linear(4, 3), config=glora.GLoRAConfig.bitfit(), name="a")
    glora.apply(layer, config=RANDOM, name="b")
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert "parametrizations.bias.0.b.C.shift" in layer.state_dict()
    glora.delete(layer, "b")
    assert "parametrizations.bias.0.b.C.shift" not in layer.state_dict()
    glora.apply(layer, config=RANDOM, name="c")
