"""A quantised weight that needs no other library, and what holds of every kind of them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import glora
from glora import GLoRAConfig
from tests.helpers import internals
from tests.helpers.calls import attach, only

Quantise = Callable[[nn.Module], object]
"""Quantises the weights of a model's linear layers, in place."""


class Int8Rows(Tensor):
    """A matrix as int8 with a scale for each row; made as torchao's Int8Tensor is, and knowing no more than it must."""

    numbers: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> Int8Rows:
        made = Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype, device=numbers.device)
        made.numbers, made.scale = numbers, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Int8Rows:
        return Int8Rows(inner["numbers"], inner["scale"])

    def dequantize(self) -> Tensor:
        return self.numbers.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, W, bias = (*args, None)[:3]
            if x.dtype != W.dtype:
                raise NotImplementedError(f"x in {x.dtype}, W in {W.dtype}")
            y = x @ W.numbers.to(x.dtype).T * W.scale.to(x.dtype).flatten()
            y = y.view(*y.shape)  # as torchao's may be
            return y if bias is None else y + bias
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types, kwargs
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.slice.Tensor):
            held, *rest = args
            return type(held)(func(held.numbers, *rest), func(held.scale, *rest))
        raise NotImplementedError(f"{func} of {cls.__name__}")


def quantise_rows(model: nn.Module) -> None:
    """Give every linear layer of a model such a weight."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
            numbers = (layer.weight.detach() / scale).round().to(torch.int8)
            layer.weight = nn.Parameter(Int8Rows(numbers, scale), requires_grad=False)


def block(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Sequential:
    """Two layers, wide enough for groups of 32 and of several blocks of rows."""
    return nn.Sequential(nn.Linear(64, 32, bias), nn.GELU(), nn.Linear(32, 64, bias)).to(dtype)


def quantised_pair(
    quantise: Quantise, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[nn.Sequential, nn.Sequential]:
    """A quantised model, and a float one whose weights are the dequantised."""
    model, plain = block(dtype, bias), block(dtype, bias)
    quantise(model)
    plain.load_state_dict(
        {key: value.dequantize() if value.ndim > 1 else value for key, value in model.state_dict().items()}
    )
    return model, plain


FORMS = {
    "the default": GLoRAConfig.glora(rank=2, init="random"),
    "A and B low rank": only(A="lora", B="lora", rank=2, init="random"),
    "A low rank, vector beside": only(A="lora", B="vector", C="vector", rank=2, init="random"),
    "LoRA": GLoRAConfig.lora(rank=2, init="random"),
    "vectors": only(A="vector", B="vector", C="lora", D="vector", E="vector", rank=2, init="random"),
    "constants": only(A="constant", B="constant", D="constant", E="constant", init="random"),
    "matrix product": only(A="lora", B="lora", C="vector", product="matmul", rank=2, init="random"),
    "input channels": only(A="vector", B="lora", product="matmul", rank=2, init="random"),
    "prompt": GLoRAConfig.prompt(init="random"),
}


def of_layers(forms: dict[str, GLoRAConfig]) -> list[Any]:
    """Each form on layers with a bias, and without one where it has something left to adapt, with names for pytest."""
    return [
        pytest.param(bias, config, id=f"{name}, {'bias' if bias else 'no bias'}")
        for name, config in forms.items()
        for bias in (True, False)
        if bias or (config.A, config.B) != ("none", "none")
    ]


def differences(
    quantise: Quantise, config: GLoRAConfig, dtype: torch.dtype = torch.float32, bias: bool = True, rows: int = 10
) -> dict[str, float]:
    """How far a quantised base with an adapter is from the float model with the same adapter, by norm.

    Of the outputs, with and without gradients, of the gradient of the input and of every factor. W0 goes through in
    blocks of `rows`.
    """
    model, plain = quantised_pair(quantise, dtype, bias)
    glora.load_state_dict(attach(plain, config), glora.state_dict(attach(model, config)))
    x = torch.randn(40, 64, dtype=dtype)
    found: dict[str, float] = {}
    with blocks_of(rows):
        outputs: list[Tensor] = []
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for each, given in zip((model, plain), inputs, strict=True):
            outputs.append(each(given))
            outputs[-1].square().mean().backward()
        for tokens in (1, 40):
            with torch.no_grad():
                found[f"outputs of {tokens}"] = _difference(model(x[:tokens]), plain(x[:tokens]))
    found["outputs"] = _difference(*outputs)
    found["input"] = _difference(inputs[0].grad, inputs[1].grad)
    for (key, one), other in zip(glora.named_parameters(model), glora.parameters(plain), strict=True):
        found[key] = _difference(one.grad, other.grad)
    return found


def _difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@contextmanager
def blocks_of(rows: int, columns: int = 64) -> Generator[None]:
    """W0 in blocks of this many rows."""
    with internals.entries_of_a_block(rows * columns):
        yield


class FloatsMade(TorchDispatchMode):
    """The most numbers that any floating tensor made inside has."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and type(tensor) in (Tensor, nn.Parameter):
                self.most = max(self.most, tensor.numel())
        return made


def most_floats(quantise: Quantise, config: GLoRAConfig, rows: int) -> int:
    """The numbers of the largest floating tensor that a training step makes, with W0, 64 x 64, in blocks of `rows`."""
    layer = nn.Sequential(nn.Linear(64, 64))
    quantise(layer)
    glora.apply(layer, config=config)
    with blocks_of(rows), FloatsMade() as made:
        layer(torch.randn(4, 64, requires_grad=True)).square().sum().backward()
    return made.most
