"""Modules of every kind inside a route, whichever room routes them: keywords, nesting, copies, checkpoints."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import glora
from tests.helpers.calls import RANDOM, attach
from tests.helpers.models import two_adapters
from tests.helpers.state import same, with_output

NAMES = ["a", None, "b", "a"]


class Outer(nn.Linear):
    """An adapted layer that has another inside, is called in several ways and gives more than one result."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.inner = nn.Linear(4, 4)

    def forward(self, input: Tensor, *more: Tensor, scale: Tensor | None = None, plus: Any = None) -> Any:
        y = self.inner(super().forward(input)) + sum(more, torch.zeros(()))
        y = y if scale is None else y * scale
        return {"y": y if plus is None else y + plus["z"][0], "width": self.out_features}


class Head(nn.Module):
    """A module that trains as a whole, with tensors of its own above those of its children."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x) * self.gain) * self.out.bias


class Nest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer, self.head = Outer(), Head()

    def forward(self, x: Tensor, way: int = 0) -> Tensor:
        calls: list[Any] = [
            lambda: self.outer(x),
            lambda: self.outer(input=x),
            lambda: self.outer(x, scale=x),
            lambda: self.outer(x, x, x[:, :1], plus={"z": [x.cos()]}),
            lambda: self.outer(input=x, scale=torch.full((1, 4), 2.0)),
        ]
        return self.head(calls[way]()["y"])


def nested() -> Nest:
    torch.manual_seed(0)
    model = Nest()
    for name in "ab":
        attach(model, targets="outer.*", config=RANDOM, name=name, trainable=["head"])
        with torch.no_grad():
            for parameter in glora.parameters(model, name):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@given(st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=6), st.integers(0, 4))
def test_arguments_and_modules_inside_modules_are_split_once_and_by_sample(names: list[str | None], way: int) -> None:
    model, x = nested(), torch.randn(len(names), 4)
    rows: list[Tensor] = []
    for index, name in enumerate(names):
        glora.activate(model, {} if name is None else name)
        rows.append(model(x[index : index + 1], way))
    with glora.route(model, names):
        found = model(x, way)
    torch.testing.assert_close(found, torch.cat(rows))


@pytest.mark.parametrize("copied", [copy.deepcopy, AveragedModel], ids=["deepcopy", "averaged"])
def test_a_copy_made_inside_is_a_stranger(copied: Any) -> None:
    model, x = two_adapters(), torch.randn(3, 6)
    with glora.route(model, ["a", "b", None]):
        replica = copied(model)
    replica = getattr(replica, "module", replica)
    wanted = with_output(model, x)
    assert same(with_output(replica, x), wanted)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert same(with_output(replica, x), wanted)
    for name in "ab":
        glora.activate(replica, name)
    assert replica.up.weight.shape == (16, 8)
    with glora.route(replica, ["a", "b", None]):
        replica(x)
    glora.remove(replica)
    assert type(replica.up) is nn.Linear


class Twice(nn.Linear):
    """As a head: its output, and something beside it."""

    def __init__(self, beside: Any) -> None:
        super().__init__(4, 2)
        self.beside = beside

    def forward(self, input: Tensor) -> Any:
        y = F.linear(input, self.weight, self.bias)
        return y, self.beside(y)


@pytest.mark.parametrize("beside", [lambda y: y.square().mean(), lambda y: y.mean().item(), lambda y: y[:, 0].sum()])
@pytest.mark.parametrize("each", [1, 2])
def test_a_result_that_is_none_of_a_samples_and_differs_is_refused(beside: Any, each: int) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Twice(beside)), torch.randn(2 * each, 4)
    for name in "ab":
        glora.apply(model, ["0"], RANDOM, name=name, trainable=["1"])
    glora.state_dict(model, "b")["1.weight"].mul_(10)
    with glora.route(model, ["a", "b"] * each), pytest.raises(RuntimeError, match="one for each sample"):
        model(x)
    with glora.route(model, ["b"] * 2 * each):
        y, aside = model(x)
    glora.activate(model, "b")
    torch.testing.assert_close((y, aside), model(x))


@pytest.mark.parametrize("beside", [lambda _: None, lambda _: "text", lambda _: torch.ones(2), lambda y: y.shape[1]])
def test_a_result_that_is_the_same_for_all_is_given_once(beside: Any) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Twice(beside)), torch.randn(3, 4)
    for name in "ab":
        glora.apply(model, ["0"], RANDOM, name=name, trainable=["1"])
    with glora.route(model, ["a", "b", "a"]):
        y, aside = model(x)
    assert y.shape == (3, 2)
    assert torch.equal(aside, beside(y)) if isinstance(aside, Tensor) else aside == beside(y)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_around_a_routed_layer_is_refused_and_around_the_route_is_right(reentrant: bool) -> None:
    model, x = two_adapters(), torch.randn(4, 6, requires_grad=True)
    model.requires_grad_(True)
    for parameter in glora.parameters(model, "a"):
        parameter.requires_grad_(True)

    def gradients(y: Tensor) -> list[Tensor | None]:
        for parameter in model.parameters():
            parameter.grad = None
        y.square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    with glora.route(model, NAMES):
        with pytest.raises(RuntimeError, match="Enter glora.route inside the checkpointed function"):
            checkpoint(model, x, use_reentrant=reentrant)
        plain = model(x)

    def routed(x: Tensor) -> Tensor:
        with glora.route(model, NAMES):
            return model(x)

    wanted = gradients(plain)
    torch.testing.assert_close(gradients(checkpoint(routed, x, use_reentrant=reentrant)), wanted)


def test_checkpointing_inside_a_route_without_a_gradient_is_right() -> None:
    model, x = two_adapters(), torch.randn(4, 6)
    with torch.no_grad(), glora.route(model, NAMES):
        torch.testing.assert_close(checkpoint(model, x, use_reentrant=False), model(x))


class Shifted(nn.Linear):
    def forward(self, input: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return F.linear(input, self.weight, self.bias) + shift


def test_what_has_no_row_for_each_sample_goes_to_every_adapter_whole() -> None:
    layer, x, shift = Shifted(4, 3), torch.randn(4, 4), torch.randn(3)
    for name in "ab":
        glora.apply(layer, config=RANDOM, name=name)
    with glora.route(layer, ["a", "b", "a", "b"]):
        y = layer(x, shift)
    for row, name in enumerate("abab"):
        torch.testing.assert_close(y[row], glora.activate(layer, name)(x, shift)[row])
