"""What is refused, each with its reason, and with nothing changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import glora
from glora import GLoRAConfig
from tests.helpers.calls import RANDOM, attach, refused
from tests.helpers.models import build
from tests.helpers.state import unchanged

DROPOUT = GLoRAConfig(rank_dropout=0.5)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_recurrent_layer_is_no_head(kind: Any) -> None:
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "rnn": kind(4, 4)})
    for trainable in (["rnn"], [model["rnn"]], "rnn"):
        refused(model, "'rnn' is not: it keeps its own list of weights", ["linear"], trainable=trainable)


class Own(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)


def test_rank_dropout_is_refused_where_a_forward_is_not_nn_linears() -> None:
    replaced = nn.Linear(4, 4)
    replaced.forward = lambda x: x
    for bad in (Own(4, 4), replaced):
        model = nn.ModuleDict({"good": nn.Linear(4, 4), "bad": bad})
        refused(model, "'bad' is not: its forward is its own", ["bad"], DROPOUT)
        attach(model, GLoRAConfig(), targets=["bad"])  # without dropout it is adapted
        refused(model, "'bad' is not: its forward is its own", ["bad"], DROPOUT, name="b")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("out_features", "in_features"), [(0, 4), (4, 0), (0, 0)])
def test_an_empty_weight_is_refused(out_features: int, in_features: int) -> None:
    model = nn.ModuleDict({"good": nn.Linear(4, 4), "bad": nn.Linear(in_features, out_features)})
    refused(model, r"'bad' is not: its weight is empty", ["bad"])
    assert [layer.path for layer in glora.plan(model).layers] == ["good"]


def test_an_adapter_on_the_meta_device_is_not_written_into() -> None:
    with torch.device("meta"):
        model = attach(nn.Linear(4, 3), RANDOM)
    given = glora.state_dict(attach(nn.Linear(4, 3), RANDOM))
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"on the meta device.*to_empty"):
            glora.load_state_dict(model, given, strict=strict)
    glora.load_state_dict(model.to_empty(device="cpu"), given)
    assert torch.equal(glora.state_dict(model)["A.left"], given["A.left"])


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
    assert glora.adapters(glora.load(target, tmp_path / "one of each")) == {"default": 1.0}


def test_a_model_whose_weight_is_tied_to_another_outside_of_the_adapted_part_is_not_merged() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6))
    model[1].weight = model[0].weight
    attach(model[1], RANDOM)
    table = model[0].weight.detach().clone()
    with unchanged(model), pytest.raises(ValueError, match="tied"):
        glora.merge(model)
    glora.remove(model)
    assert torch.equal(model[0].weight, table)


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
