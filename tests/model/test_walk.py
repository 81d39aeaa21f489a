"""The walk of a model: paths under wrappers, a module that two paths reach, what is no module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import glora
from tests.helpers.calls import LORA, chosen, warned
from tests.helpers.models import ALL_OF_NET, Net

WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "AveragedModel": AveragedModel,
    "compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "compile of AveragedModel": lambda model: torch.compile(AveragedModel(model)),
    "AveragedModel of compile": lambda model: AveragedModel(torch.compile(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_paths_and_keys_drop_the_prefixes_of_wrappers(wrap: Callable[[nn.Module], Any]) -> None:
    plain = Net()
    base = plain.state_dict()
    model = wrap(plain)
    assert chosen(model, r"layers\.0\.q_proj") == ["layers.0.q_proj"]
    assert chosen(model) == ALL_OF_NET
    glora.apply(model, trainable=["embed"], config=glora.GLoRAConfig.glora())
    expected = glora.apply(Net(), trainable=["embed"], config=glora.GLoRAConfig.glora())
    assert list(glora.state_dict(model)) == list(glora.state_dict(expected))
    assert [key for key, _ in glora.named_parameters(model)] == [key for key, _ in glora.named_parameters(expected)]
    assert glora.base_state_dict(model).keys() == base.keys()
    assert [row.path for row in glora.summary(model).rows] == [row.path for row in glora.summary(expected).rows]


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_root_layers_key_is_the_bare_path(wrap: Callable[[nn.Module], Any]) -> None:
    assert list(glora.state_dict(glora.apply(wrap(nn.Linear(4, 4)), config=LORA))) == ["B.left", "B.right"]


def test_a_models_own_attribute_named_like_a_wrappers_stays_in_the_path() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(4, 4)

    model = glora.apply(Holder(), ["module"], LORA)
    assert list(glora.state_dict(model)) == ["module.B.left", "module.B.right"]
    assert set(glora.base_state_dict(model)) == {"module.weight", "module.bias"}


class Shared(nn.Module):
    """One linear layer that two paths reach."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.other = nn.Linear(4, 4)


@pytest.mark.parametrize("targets", [["first"], ["second"], "first", "second", ["first", "second"], {"second": LORA}])
def test_a_shared_module_counts_once_and_answers_to_both_of_its_paths(targets: Any) -> None:
    model = Shared()
    assert chosen(model, targets) == ["first"]
    assert chosen(model, lambda path, _module: path == "second") == ["first"]
    glora.apply(model, targets, None if isinstance(targets, dict) else LORA)
    assert list(glora.state_dict(model)) == ["first.B.left", "first.B.right"]
    assert model.first is model.second


def test_a_shared_module_is_excluded_and_trained_under_either_path() -> None:
    for path in ("first", "second"):
        assert chosen(Shared(), exclude=[path]) == ["other"]
        assert [
            head.path
            for head in glora.plan(Shared(), ["other"], trainable=[path], config=glora.GLoRAConfig.glora()).heads
        ] == ["first"]


def test_a_shared_module_is_no_tie() -> None:
    assert chosen(Shared()) == ["first", "other"]
    assert warned(lambda: glora.apply(Shared(), config=glora.GLoRAConfig.glora())) == []


def test_plan_refuses_what_is_no_module() -> None:
    nothing: Any = {"head": nn.Linear(2, 2)}
    with pytest.raises(ValueError, match=r"nn\.Module; found a dict"):
        glora.plan(nothing, config=glora.GLoRAConfig.glora())
