"""`plan` is what `apply` does."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from glora import GLoRAConfig
from tests.helpers import internals
from tests.helpers.calls import warned
from tests.helpers.models import ALL_OF_NET, Net
from tests.helpers.state import snapshot
from tests.helpers.strategies import configs


def mixed() -> nn.Module:
    """Layers of several shapes: with a bias, without one, lazy, reached twice, and a norm with buffers."""
    model = nn.Module()
    model.up, model.down = nn.Linear(3, 5), nn.Linear(5, 2, bias=False)
    model.late, model.again, model.norm = nn.LazyLinear(4), model.up, nn.BatchNorm1d(2)
    model.head = nn.Linear(2, 7)
    return model


@given(
    config=configs(init="identity", needs="ABCDE"),
    exclude=st.sampled_from([(), ["head"], ["down"], "down|head"]),
    trainable=st.sampled_from([(), ["norm"], ["head", "norm"], ["down"]]),
)
def test_plan_is_what_apply_then_does_and_changes_nothing(config: GLoRAConfig, exclude: Any, trainable: Any) -> None:
    model = mixed()
    before, generator = snapshot(model), torch.get_rng_state()
    planned = glora.plan(model, "all-linear", config, exclude=exclude, trainable=trainable)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), generator)

    messages = warned(lambda: glora.apply(model, "all-linear", config, exclude=exclude, trainable=trainable))
    unsupported = any(internals.is_unsupported(skipped) for skipped in planned.skipped)
    adapted_head = any(layer.path == "head" for layer in planned.layers)
    assert len(messages) == unsupported + bool(planned.without_bias) + adapted_head
    attached = glora.state_dict(model)
    assert planned.parameters == sum(parameter.numel() for parameter in glora.parameters(model))
    assert planned.parameters == sum(row.parameters for row in (*planned.layers, *planned.heads))
    for layer in planned.layers:
        own = {key.removeprefix(f"{layer.path}.") for key in attached if key.startswith(f"{layer.path}.")}
        assert {key.split(".")[0] for key in own} == set(layer.paths)
        assert layer.forms == " ".join(f"{path}={config.forms[path]}" for path in layer.paths)
        assert layer.rank == (config.rank if any(key.endswith("left") for key in own) else None)
        assert layer.parameters == sum(attached[f"{layer.path}.{key}"].numel() for key in own)
        assert model.get_submodule(layer.path) is layer.module
    reached = [layer.path for layer in planned.layers] + [skipped.path for skipped in planned.skipped]
    assert sorted(reached) == ["down", "head", "late", "up"]
    touched = {key.split(".")[0] for key in attached}
    assert touched == {row.path for row in (*planned.layers, *planned.heads)}
    assert not touched & ({skipped.path for skipped in planned.skipped} - {head.path for head in planned.heads})

    again = snapshot(model)
    second = glora.plan(model, "all-linear", config, exclude=exclude, trainable=trainable, name="second")
    assert snapshot(model) == again
    assert second.parameters == planned.parameters


def test_a_plan_prints_every_layer_head_and_skipped_layer() -> None:
    model = Net()
    model.head.weight = model.embed.weight
    planned = glora.plan(model, config=GLoRAConfig(rank=2), exclude=["1.k_proj"], trainable=["0.norm"])
    lines = str(planned).splitlines()
    assert re.search(r"'default'.* 3 layers, ", lines[0])
    assert lines[-1] == "reaches 75% of 64 matrix numbers; not reached: Linear.weight 25%"
    cells = {line.split()[0]: line for line in lines[2:-1]}
    assert set(cells) == {*ALL_OF_NET, "layers.0.norm"}
    assert re.search(r"A=lora B=lora C=vector D=vector E=vector +2 +\d+$", cells["layers.0.q_proj"])
    assert "skipped: excluded" in cells["layers.1.k_proj"]
    assert "tied" in cells["head"]
    assert re.search(r"trainable +- +8$", cells["layers.0.norm"])


def test_plan_refuses_what_is_no_module() -> None:
    nothing: Any = {"head": nn.Linear(2, 2)}
    with pytest.raises(ValueError, match=r"nn\.Module; found a dict"):
        glora.plan(nothing)
