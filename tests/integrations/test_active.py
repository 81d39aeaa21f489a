"""Which adapter a checkpoint holds: the only active one, and only where nothing else trains."""

from __future__ import annotations

import pytest
from torch import nn

import glora
from glora.integrations.active import active_adapter


def adapted() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6))
    return glora.apply(glora.apply(model, name="a"), name="b")


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
