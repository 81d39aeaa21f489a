"""`glora.base_state_dict`: the base model's tensors under their ordinary keys."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import glora
from tests.helpers.calls import attach
from tests.helpers.models import TOKENS, attached, build, in_states
from tests.helpers.state import clones, same


@attached
@in_states
@pytest.mark.parametrize(
    "wrap", [lambda model: model, AveragedModel, torch.compile], ids=["bare", "averaged", "compiled"]
)
def test_the_base_state_dict_is_the_plain_models(
    how: Callable[[nn.Module], object],
    state: Callable[[nn.Module], AbstractContextManager[object]],
    wrap: Callable[[nn.Module], Any],
) -> None:
    plain = build()
    model = wrap(copy.deepcopy(plain))
    how(model)
    with state(model):
        assert same(glora.base_state_dict(model), plain.state_dict())
        assert build().load_state_dict(glora.base_state_dict(model), strict=True) == ([], [])
    assert same(glora.base_state_dict(model), plain.state_dict())


def test_the_base_state_dict_of_an_averaged_adapted_model_is_the_plain_models() -> None:
    plain = build()
    model = copy.deepcopy(plain)
    attach(model, trainable=["norm", "head"])
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    assert same(glora.base_state_dict(averaged), plain.state_dict())
    assert glora.state_dict(averaged).keys() == glora.state_dict(model).keys()


def test_training_leaves_the_base_state_dict_as_it_was() -> None:
    model = build()
    plain = clones(model.state_dict())
    attach(model, trainable=["norm", "head"])
    optimizer = torch.optim.SGD(glora.parameters(model), lr=0.1)
    before = clones(glora.state_dict(model))
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(TOKENS).square().sum().backward()
        optimizer.step()
    moved = {key for key, tensor in glora.state_dict(model).items() if not torch.equal(tensor, before[key])}
    # Not all: a norm in training subtracts the mean, so the bias in front of it gets no gradient.
    assert moved >= {"first.A.left", "second.B.left", "norm.weight", "norm.running_mean", "head.weight", "head.bias"}
    assert same(glora.base_state_dict(model), plain)
    with glora.merged(model):
        assert same(glora.base_state_dict(model), plain)


def test_the_base_state_dict_of_a_plain_model_is_its_state_dict() -> None:
    model = build()
    assert same(glora.base_state_dict(model), model.state_dict())


def test_a_layer_that_torch_has_merged_gives_what_it_holds() -> None:
    model = build()
    plain = clones(model.state_dict())
    attach(model)
    merged = model.first.weight.detach().clone()
    parametrize.remove_parametrizations(model.first, "weight")
    assert same(glora.base_state_dict(model), plain | {"first.weight": merged})
