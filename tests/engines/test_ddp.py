"""DistributedDataParallel on one rank: what it does not synchronise is refused at its first gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import glora
from tests.helpers.calls import RANDOM
from tests.helpers.models import adapted_block

X = torch.ones(2, 6)


def hooks(model: nn.Module) -> int:
    return sum(len(parameter._backward_hooks or ()) for parameter in model.parameters())


LATER: dict[str, Callable[[nn.Module], object]] = {
    "c": lambda model: glora.apply(model, config=RANDOM, name="c"),
    "a": lambda model: glora.activate(model, "a"),
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", LATER, ids=["attached", "activated"])
def test_what_acts_after_wrapping_serves_and_is_refused_at_its_first_gradient(name: str) -> None:
    model = glora.apply(adapted_block(name="a"), config=RANDOM, name="b")
    wrapped = DistributedDataParallel(model)
    wrapped(X).sum().backward()
    LATER[name](model)
    with torch.no_grad():
        wrapped(X)
    with pytest.raises(RuntimeError, match="activated later has got a gradient.*Wrap the model again"):
        wrapped(X).sum().backward()
    again = DistributedDataParallel(model)  # what the message says, with the old wrapper still there
    again(X).sum().backward()
    assert not any(parameter._backward_hooks for parameter in glora.parameters(model, name))
    glora.activate(model, "b")  # synchronised from the start
    wrapped(X).sum().backward()


@pytest.mark.usefixtures("one_rank")
def test_a_parameter_is_watched_once() -> None:
    model = adapted_block(name="a")
    glora.apply(model, config=RANDOM, name="b")
    before = hooks(model)
    for name in ("a", "b", "a", "b"):
        glora.activate(model, name)
    assert hooks(model) <= 2 * before


def test_nothing_is_watched_without_a_process_group() -> None:
    assert hooks(adapted_block()) == 0
