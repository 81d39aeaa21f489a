"""Calls of the library that many tests make, and what they say."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import glora
from glora import GLoRAConfig
from tests.helpers.state import unchanged

FORMS: dict[str, tuple[str, ...]] = {
    "A": ("lora", "vector", "constant", "none"),
    "B": ("lora", "vector", "constant", "none"),
    "C": ("lora", "vector", "none"),
    "D": ("vector", "constant", "none"),
    "E": ("vector", "constant", "none"),
}
LORA = GLoRAConfig.lora(rank=1)
RANDOM = GLoRAConfig.glora(rank=2, init="random")


def only(**given: Any) -> GLoRAConfig:
    """A config of these paths, every other path none."""
    return GLoRAConfig.glora(**{**dict.fromkeys(FORMS, "none"), **given})


@contextmanager
def quiet() -> Generator[None]:
    """No UserWarning inside: of layers without a bias, of adapters that a merge drops."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def attach(model: nn.Module, config: GLoRAConfig = RANDOM, **arguments: Any) -> nn.Module:
    """`glora.apply` without its warnings, by default of random factors to all linear layers."""
    with quiet():
        return glora.apply(model, config=config, **arguments)


def refused(model: nn.Module, match: str, *args: Any, **kwargs: Any) -> None:
    """`apply` and `plan` raise the same ValueError, and nothing has changed."""
    with unchanged(model):
        with pytest.raises(ValueError, match=match) as by_plan:
            glora.plan(model, *args, **kwargs)
        with pytest.raises(ValueError, match=match) as by_apply:
            glora.apply(model, *args, **kwargs)
    assert str(by_plan.value) == str(by_apply.value)


def chosen(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    """Paths of the layers that `apply` would adapt."""
    return [layer.path for layer in glora.plan(model, *args, **kwargs).layers]


def warned(call: Callable[[], object]) -> list[str]:
    """The warnings of a call, as text."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in record]


def factors_of(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters of all adapters."""
    return [p for name in glora.adapters(layer) for p in glora.parameters(layer, name)]


def remove_with_torch(layer: nn.Module, *tensors: str, bake: bool = True) -> None:
    """Torch's own removal of these tensors' parametrizations; of none given: all there are."""
    for name in tensors or list(layer.parametrizations):
        parametrize.remove_parametrizations(layer, name, leave_parametrized=bake)


def step(model: nn.Module, x: Tensor) -> None:
    """A step of plain gradient descent on the adapter, for a model that has one."""
    optimizer = torch.optim.SGD(glora.parameters(model), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
