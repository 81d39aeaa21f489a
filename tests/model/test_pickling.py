"""Pickling: refused of an adapted model, as ever after merge and remove."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import glora
from tests.helpers.calls import attach, quiet
from tests.helpers.models import TOKENS, Model, attached, build
from tests.helpers.state import same, same_outputs, unchanged


@attached
def test_pickling_an_adapted_model_leads_to_save_and_merge(how: Callable[[nn.Module], object]) -> None:
    model = build()
    how(model)
    with unchanged(model):
        with pytest.raises(RuntimeError, match=r"glora\.save\(model, directory\).*glora\.merge\(model\)"):
            torch.save(model, io.BytesIO())
        with pytest.raises(RuntimeError, match=r"glora\.save\(model, directory\).*glora\.merge\(model\)"):
            pickle.dumps(model)


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@attached
@pytest.mark.parametrize("finish", [glora.merge, glora.remove])
def test_torch_save_works_after_merge_and_remove(
    how: Callable[[nn.Module], object], finish: Callable[[nn.Module], nn.Module]
) -> None:
    model = build()
    how(model)
    with quiet():
        finish(model)
    loaded = through_torch_save(model)
    assert type(loaded) is Model
    assert same(loaded.state_dict(), model.state_dict())
    assert same_outputs(loaded(TOKENS), model(TOKENS))


def test_torch_save_inside_merged_saves_a_plain_merged_model() -> None:
    model = build()
    attach(model)
    with glora.merged(model):
        loaded = through_torch_save(model)
        assert same_outputs(loaded(TOKENS), model(TOKENS))
    assert type(loaded.get_submodule("first")) is nn.Linear
    assert glora.adapters(loaded) == {}


def test_a_state_dict_of_an_adapter_goes_through_torch_save() -> None:
    model = build()
    attach(model, trainable=["norm"])
    file = io.BytesIO()
    torch.save(glora.state_dict(model), file)
    file.seek(0)
    assert same(torch.load(file, weights_only=True), glora.state_dict(model))
