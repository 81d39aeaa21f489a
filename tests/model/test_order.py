"""The order of an adapter's parameters, by which optimizers' state dicts go."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from tests.helpers.calls import attach
from tests.helpers.models import build
from tests.helpers.strategies import configs, tally

HISTORIES = ["before", "before, and deleted", "after"]


def keys(model: nn.Module) -> list[str]:
    return [key for key, _ in glora.named_parameters(model, "it")]


@given(
    config=configs(needs="ABCDE"),
    other=configs(needs="ABCDE"),
    history=st.sampled_from(HISTORIES),
    heads=st.tuples(*[st.sampled_from([[], ["norm"], ["head", "norm"], ["norm", "head"]])] * 2),
)
def test_the_order_goes_by_the_model_and_not_by_what_else_was_attached(
    config: glora.GLoRAConfig, other: glora.GLoRAConfig, history: str, heads: tuple[list[str], list[str]]
) -> None:
    tally("history", history)
    targets = ["first", "second", "third"]
    plain = build()
    alone = attach(copy.deepcopy(plain), config, name="it", targets=targets, trainable=heads[0])
    beside = copy.deepcopy(plain)
    if history != "after":
        attach(beside, other, name="other", targets=targets, trainable=heads[1])
    attach(beside, config, name="it", targets=targets, trainable=heads[0])
    if history == "before, and deleted":
        glora.delete(beside, "other")
    elif history == "after":
        attach(beside, other, name="other", targets=targets, trainable=heads[1])
    assert keys(beside) == keys(alone)
    assert list(glora.state_dict(beside, "it")) == list(glora.state_dict(alone, "it"))
    # In all of the model's parameters, too, the adapter's stand in that order.
    glora.activate(beside, "it")
    own = {id(parameter): key for key, parameter in glora.named_parameters(beside, "it")}
    in_the_model = [own[id(parameter)] for parameter in beside.parameters() if id(parameter) in own]
    assert in_the_model == [key for key in keys(beside) if key in set(in_the_model)]


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_training_resumes_in_a_model_of_another_history(optimizer: type[torch.optim.Optimizer], tmp_path: Path) -> None:
    plain = nn.Linear(4, 4)
    # Shapes that are easily confused.
    config = glora.GLoRAConfig(A="vector", B="vector", C="vector", D="none", E="vector")

    def steps(model: nn.Module, by: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            by.zero_grad()
            model(torch.ones(3, 4)).square().sum().backward()
            by.step()

    first = copy.deepcopy(plain)
    glora.apply(first, config=glora.GLoRAConfig.bitfit(), name="other")
    glora.apply(first, config=config, name="it")
    options = {"lr": 0.01} | ({"momentum": 0.9} if optimizer is torch.optim.SGD else {})
    by = optimizer(glora.parameters(first, "it"), **options)
    steps(first, by, 3)
    glora.save(first, tmp_path, "it")
    second = glora.load(copy.deepcopy(plain), tmp_path, "it")
    again = optimizer(glora.parameters(second, "it"), **options)
    again.load_state_dict(copy.deepcopy(by.state_dict()))
    steps(first, by, 2)
    steps(second, again, 2)
    for (key, a), (other_key, b) in zip(
        glora.named_parameters(first, "it"), glora.named_parameters(second, "it"), strict=True
    ):
        assert key == other_key
        torch.testing.assert_close(a, b)
