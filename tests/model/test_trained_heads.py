"""Heads over time: buffers bound anew, mixes, and whose memory is whose after a merge."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import glora
from tests.helpers.calls import RANDOM, attach, quiet
from tests.helpers.models import TOKENS, build
from tests.helpers.state import clones, same


class Counts(nn.Module):
    """Binds its buffers anew in training, as some modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls = self.calls + 1
            self.mean = x.detach().mean(0)
        return x + self.shift - self.mean


def test_a_buffer_that_a_head_binds_anew_goes_to_the_adapter_that_acts() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Counts()), torch.randn(3, 4)
    base = clones(model.state_dict())
    for name in ("a", "b"):
        glora.apply(model, ["0"], name=name, trainable=["1"], config=glora.GLoRAConfig.glora())
    calls = {"a": 2, "b": 1}
    for name, count in calls.items():
        glora.activate(model, name)
        for _ in range(count):
            model(x)
    assert {name: glora.state_dict(model, name)["1.calls"].item() for name in "ab"} == calls
    assert same(glora.base_state_dict(model), base)
    replica = copy.deepcopy(model)
    replica(x)
    assert {name: glora.state_dict(model, name)["1.calls"].item() for name in "ab"} == calls
    with glora.disabled(model):  # the base's own, as it is in training without adapters
        model(x)
    assert glora.base_state_dict(model)["1.calls"] == 1
    assert {name: glora.state_dict(model, name)["1.calls"].item() for name in "ab"} == calls
    y = model.eval()(x)
    with quiet():
        glora.merge(model)
    assert torch.equal(model(x), y)
    assert model[1].calls == 1
    model.train()(x)
    assert model[1].calls == 2


def test_adapters_with_equal_heads_that_do_not_train_act_together() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4)
    for name in "ab":
        glora.apply(model, ["0"], RANDOM, name=name, trainable=["1"]).requires_grad_(False)
    glora.activate(model, {"a": 1.0, "b": 1.0})
    y = model(x)
    torch.testing.assert_close(y, model[1](model[0](x)))
    with quiet():
        glora.merge(model)
    torch.testing.assert_close(model(x), y)


def test_training_adapters_together_leaves_their_heads_fit_to_act_together() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    for name in "ab":
        glora.apply(model, ["0"], RANDOM, name=name, trainable=["1"])
    weights = {"a": 1.0, "b": 1.0}
    glora.activate(model, weights)
    assert not any(p.requires_grad for p in model[1].parameters())  # equal heads stay equal
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    glora.activate(model, weights)


FINISH: dict[str, Callable[[nn.Module], object]] = {"merge": glora.merge, "remove": glora.remove}


def finished(finish: Callable[[nn.Module], object]) -> tuple[nn.Module, dict[str, Tensor], torch.optim.Optimizer]:
    """A model whose adapter is baked in or taken off, the adapter's state dict from before, and its optimizer."""
    model = build()
    attach(model, trainable=["head", "norm"])
    kept, optimizer = glora.state_dict(model), torch.optim.SGD(glora.parameters(model), lr=1.0)
    model(TOKENS).square().sum().backward()
    finish(model)
    return model, kept, optimizer


@pytest.mark.parametrize("finish", FINISH.values(), ids=FINISH)
def test_a_state_dict_that_was_kept_stays_as_it_was_while_the_model_trains_on(
    finish: Callable[[nn.Module], object],
) -> None:
    model, kept, _ = finished(finish)
    before = clones(kept)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert same(kept, before)


@pytest.mark.parametrize("finish", FINISH.values(), ids=FINISH)
def test_an_adapters_optimizer_that_goes_on_leaves_the_model_alone(finish: Callable[[nn.Module], object]) -> None:
    model, _, optimizer = finished(finish)
    y = model(TOKENS)
    optimizer.step()
    assert torch.equal(model(TOKENS), y)
