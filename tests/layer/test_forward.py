"""The forward of an adapted layer: that of its class, over whatever stands for its tensors."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import glora
from tests.helpers.calls import attach, factors_of
from tests.helpers.kernels import KINDS
from tests.helpers.strategies import DTYPES, HALF

kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


class Doubled(nn.Linear):
    def forward(self, input: Tensor, times: float = 2.0) -> Tensor:
        return times * super().forward(input)


class Squashed(Doubled):
    """Its forward is that of a class between it and nn.Linear."""


class Reads(nn.Linear):
    def forward(self, input: Tensor, times: float = 1.0) -> Tensor:
        return times * torch.tanh(input @ self.weight.T + self.bias)


@kinds
@pytest.mark.parametrize("kind", [Doubled, Squashed, Reads])
def test_a_subclass_keeps_its_own_forward_over_the_adapted_tensors(
    kind: type[nn.Linear], config: glora.GLoRAConfig
) -> None:
    layer, plain, x = attach(kind(6, 5), config), kind(6, 5), torch.randn(3, 6)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(layer.bias)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(layer(x), plain(x))
            torch.testing.assert_close(layer(input=x, times=3.0), plain(x, 3.0))
    layer(x).sum().backward()
    assert all(factor.grad is not None for factor in factors_of(layer))


@kinds
def test_a_forward_of_the_instances_own_is_called(config: glora.GLoRAConfig) -> None:
    layer = attach(nn.Linear(6, 5), config)
    layer.forward = lambda x: x + 1
    assert torch.equal(layer(torch.zeros(2)), torch.ones(2))


class Double(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return 2 * tensor


@kinds
@pytest.mark.parametrize("on", [["weight"], ["bias"], ["weight", "bias"]], ids="-".join)
def test_a_foreign_parametrization_on_top_acts_in_the_forward(on: list[str], config: glora.GLoRAConfig) -> None:
    layer, x = attach(nn.Linear(6, 5), config), torch.randn(3, 6)
    values = {name: getattr(layer, name).detach().clone() for name in ("weight", "bias")}
    for name in on:
        parametrize.register_parametrization(layer, name, Double())
        values[name] *= 2
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(layer(x), F.linear(x, values["weight"], values["bias"]))
    found = torch.autograd.grad(layer(x).sum(), factors_of(layer))
    assert all(grad.any() for grad in found)


@kinds
@pytest.mark.parametrize("placed", [["weight"], ["bias"], ["weight", "bias"]], ids="-".join)
def test_a_tensor_under_a_plain_key_counts(placed: list[str], config: glora.GLoRAConfig) -> None:
    layer, x = attach(nn.Linear(6, 5), config), torch.randn(3, 6)
    values = {name: getattr(layer, name).detach().clone() for name in ("weight", "bias")}
    given = {name: torch.randn_like(values[name], requires_grad=True) for name in placed}
    y = torch.func.functional_call(layer, given, (x,))
    torch.testing.assert_close(y, F.linear(x, *(values | given).values()))
    y.sum().backward()
    assert all(tensor.grad is not None for tensor in given.values())
    assert torch.equal(layer.weight, values["weight"])
    assert torch.equal(layer.bias, values["bias"])
    torch.testing.assert_close(layer(x), F.linear(x, **values))


def test_a_heads_tensor_under_a_plain_key_counts() -> None:
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)), torch.randn(3, 6)
    glora.apply(model, ["0"], trainable=["1"], config=glora.GLoRAConfig.glora())
    weight = torch.randn(2, 5)
    y = torch.func.functional_call(model, {"1.weight": weight}, (x,))
    torch.testing.assert_close(y, F.linear(model[0](x), weight, model[1].bias))


def outcome(layer: nn.Module, x: Tensor) -> str:
    try:
        return str(layer(x).dtype)
    except RuntimeError:
        return "raises"


@kinds
@pytest.mark.parametrize("half", [None, *HALF], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_meet_as_in_a_plain_layer(
    dtype: torch.dtype, half: torch.dtype | None, config: glora.GLoRAConfig
) -> None:
    plain = nn.Linear(6, 5, dtype=dtype)
    layer = attach(nn.Linear(6, 5, dtype=dtype), config)
    with contextlib.nullcontext() if half is None else torch.autocast("cpu", half):
        for given in DTYPES:
            for tokens in (1, 60):
                x = torch.randn(tokens, 6).to(given)
                for grad in (True, False):
                    with torch.set_grad_enabled(grad):
                        assert outcome(layer, x) == outcome(plain, x), (given, tokens, grad)


class Multiplications(TorchDispatchMode):
    """How many elementwise multiplications there were in a `with` block."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ("aten::mul.Tensor", "aten::mul_.Tensor")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("weight", "expected"), [(1.0, 0), (0.5, 2)])
def test_what_nothing_scales_is_not_multiplied(weight: float, expected: int) -> None:
    layer = glora.apply(nn.Linear(4, 3), config=glora.GLoRAConfig.glora(A="none", init="random"), name="a")
    glora.activate(layer, {"a": weight})
    with torch.no_grad(), Multiplications() as multiplied:
        layer(torch.randn(2, 4))
    assert multiplied.count == expected  # B, and what is added to the bias
