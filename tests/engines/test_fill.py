"""A file goes into the adapter of its description, or is refused with what differs (Note [Load after sharding])."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import glora
from glora import GLoRAConfig
from glora.engines.fill import fill_spec, is_filled_by_load
from glora.model.state import describe
from tests.helpers.calls import RANDOM, attach
from tests.helpers.models import adapted_block, block
from tests.helpers.state import clones, same, unchanged


def fill(model: nn.Module, source: nn.Module, *, trainable: bool = True) -> nn.Module:
    return fill_spec(model, describe(source, None), "the file", "a", trainable=trainable)


@pytest.mark.parametrize("trainable", [True, False])
def test_it_writes_the_file_and_lets_it_alone_act(trainable: bool) -> None:
    source = adapted_block(trainable=["2"], targets=["0"])
    model = attach(block(), RANDOM, targets=["0"], trainable=["2"], name="a")
    attach(model, RANDOM, targets=["0"], name="b")
    other = clones(glora.state_dict(model, "b"))
    fill(model, source, trainable=trainable)
    assert same(glora.state_dict(model, "a"), glora.state_dict(source))
    assert same(glora.state_dict(model, "b"), other)
    assert glora.adapters(model) == {"a": 1.0, "b": 0.0}
    assert {parameter.requires_grad for parameter in glora.parameters(model, "a")} == {trainable}


def test_how_it_started_and_what_it_drops_out_may_differ() -> None:
    model = attach(block(), GLoRAConfig.glora(rank=2, rank_dropout=0.5), name="a")
    fill(model, attach(block(), GLoRAConfig.glora(rank=2, init="random")))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"config": GLoRAConfig.glora(rank=3)}, "'0' is GLoRAConfig.*in the model and GLoRAConfig"),
        ({"config": GLoRAConfig.glora(rank=2, alpha=5)}, "'0' is GLoRAConfig"),
        ({"config": GLoRAConfig.glora(rank=2, product="matmul")}, "'0' is GLoRAConfig"),
        ({"targets": ["0"]}, "'2' is adapted in the file alone"),
        ({"targets": ["0"], "trainable": ["2"]}, "heads .* tied to .* in the model, .* in the file"),
    ],
    ids=["rank", "alpha", "product", "layers", "heads"],
)
def test_another_description_is_refused_and_nothing_has_changed(arguments: Any, match: str) -> None:
    model = attach(block(), **{"config": RANDOM, "name": "a", **arguments})
    with unchanged(model), pytest.raises(glora.AdapterFileError, match=match):
        fill(model, attach(block(), RANDOM))


def test_a_bias_that_was_created_and_has_no_memory_yet_is_zeros_again() -> None:
    config = GLoRAConfig.glora(rank=2, create_bias=True, init="random")
    source = attach(nn.Sequential(nn.Linear(4, 3, bias=False)), config)
    with torch.device("meta"):
        model = attach(nn.Sequential(nn.Linear(4, 3, bias=False)), config, name="a")
    model.to_empty(device="cpu")
    with torch.no_grad():
        model[0].parametrizations.bias.original.fill_(7.0)
    fill(model, source)
    assert not model[0].parametrizations.bias.original.any()


def test_a_model_that_is_whole_takes_a_new_adapter_instead(tmp_path: Path) -> None:
    model = adapted_block()
    assert not is_filled_by_load(model, "default")
    glora.save(model, tmp_path)
    with pytest.raises(ValueError, match="'default' is attached already"):
        glora.load(model, tmp_path)
