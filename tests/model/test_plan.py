"""`plan` is what `apply` does; a description of an adapter that does not fit the model is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from glora import GLoRAConfig
from glora.spec import AdapterSpec, LayerSpec
from tests.helpers import internals
from tests.helpers.calls import RANDOM, attach, quiet, warned
from tests.helpers.state import snapshot, unchanged
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
        assert layer.parameters == sum(attached[f"{layer.path}.{key}"].numel() for key in own if key != "A.balance")
        assert model.get_submodule(layer.path) is layer.module
    reached = [layer.path for layer in planned.layers] + [skipped.path for skipped in planned.skipped]
    assert sorted(reached) == ["down", "head", "late", "up"]
    touched = {key.split(".")[0] for key in attached}
    assert touched == {row.path for row in (*planned.layers, *planned.heads, *planned.statistics)}
    assert not touched & ({skipped.path for skipped in planned.skipped} - {head.path for head in planned.heads})

    again = snapshot(model)
    second = glora.plan(model, "all-linear", config, exclude=exclude, trainable=trainable, name="second")
    assert snapshot(model) == again
    assert second.parameters == planned.parameters


def test_an_adapter_of_two_modules_does_not_go_onto_one_that_has_both_paths(tmp_path: Path) -> None:
    source = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.LayerNorm(4), "d": nn.LayerNorm(4)})
    target = nn.ModuleDict({"a": (one := nn.Linear(4, 4)), "b": one, "c": (norm := nn.LayerNorm(4)), "d": norm})
    for name, arguments in {
        "layers": {"targets": ["a", "b"]},
        "heads": {"targets": ["a"], "trainable": ["c", "d"]},
        "a layer and a head": {"targets": ["a"], "trainable": ["b"]},
    }.items():
        glora.save(attach(copy.deepcopy(source), RANDOM, **arguments), tmp_path / name)
        with unchanged(target), pytest.raises(glora.AdapterFileError, match="reach the same module"):
            glora.load(target, tmp_path / name)
    glora.save(attach(copy.deepcopy(source), RANDOM, targets=["b"], trainable=["d"]), tmp_path / "one of each")
    target["b"].load_state_dict(source["b"].state_dict())
    with quiet():  # of "a", which was another layer beside the adapter
        assert glora.adapters(glora.load(target, tmp_path / "one of each")) == {"default": 1.0}


def test_a_description_that_attaches_nothing_is_refused() -> None:
    from glora.model.attach import attach_spec

    nothing: dict[str, str] = dict.fromkeys("ABCE", "none")
    spec = AdapterSpec({"": LayerSpec(glora.GLoRAConfig.glora(**nothing))}, {}, {"D.value": torch.ones(3)})
    with pytest.raises(glora.AdapterFileError, match="it adapts nothing"):
        attach_spec(nn.Linear(4, 3, bias=False), spec, "it")


def test_names_are_checked() -> None:
    layer = nn.Linear(3, 3)
    for name in ("", "a.b", "forward", "training", "acting", 3):
        with pytest.raises(ValueError, match="An adapter's name must be"):
            glora.apply(layer, name=name, config=glora.GLoRAConfig.glora())
    glora.apply(layer, name="values", config=glora.GLoRAConfig.glora())
    with pytest.raises(ValueError, match="'values' is attached already"):
        glora.apply(layer, name="values", config=glora.GLoRAConfig.glora())
    with pytest.raises(KeyError, match="'b'"):
        glora.state_dict(layer, "b")
    glora.apply(layer, name="b", config=glora.GLoRAConfig.glora())
    with pytest.raises(ValueError, match="name=None means the only adapter; the model has 'values', 'b'"):
        glora.parameters(layer)
    with pytest.raises(ValueError, match="the model has none"):
        glora.state_dict(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["factors", "acting_copy", "freeze_prompts"])
def test_names_of_the_librarys_own_attributes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="An adapter's name must be"):
        glora.plan(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), name=name, config=glora.GLoRAConfig.glora())
