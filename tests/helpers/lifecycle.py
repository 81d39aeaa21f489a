"""What a small adapted model must compute, held apart from the library in plain float64 tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import glora
from glora.config import FORMS

Numbers = dict[str, Tensor | None]
"""Path (A to E) to the dense tensor that it stands for, alpha / rank included; None where it is none."""


def model_of(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two layers to adapt, the second without a bias, and one that serves as a head."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)).to(dtype)


def numbers_of(tensors: Mapping[str, Tensor], prefix: str, config: glora.GLoRAConfig) -> Numbers:
    """One layer's paths from an adapter's state dict."""
    found: Numbers = {}
    for path in FORMS:
        left, right = (tensors.get(f"{prefix}.{path}.{factor}") for factor in ("left", "right"))
        if left is not None and right is not None:
            found[path] = config.scaling * left.double() @ right.double()
        else:
            value = tensors.get(f"{prefix}.{path}.value")
            found[path] = None if value is None else value.double().clone()
    return found


@dataclass
class Layer:
    """One layer: the base's tensors, and each adapter's paths on either.

    Attributes:
        prompted: the weight that paths C go by; None for the base's.
        created: the bias was created, for the paths alone.
        product: an adapter's product.
    """

    weight: Tensor
    bias: Tensor | None
    prompted: Tensor | None = None
    created: bool = False
    on_weight: dict[str, Numbers] = field(default_factory=dict)
    on_bias: dict[str, Numbers] = field(default_factory=dict)
    product: dict[str, str] = field(default_factory=dict)
    heads: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def adapted_weight(self, scales: Mapping[str, float]) -> Tensor:
        for name in scales:
            if name in self.heads:
                return self.heads[name][0]
        total = self.weight.clone()
        for name, scale in scales.items():
            numbers = self.on_weight.get(name)
            if numbers is None:
                continue
            A, B = numbers["A"], numbers["B"]
            if A is not None:
                diagonal = A.ndim == 2 and A.shape[0] == 1  # of a matrix product, kept as its diagonal
                is_matrix = self.product[name] == "matmul" and A.ndim == 2 and not diagonal
                total = total + scale * (self.weight @ A if is_matrix else self.weight * A)
            if B is not None:
                total = total + scale * B
        return total

    def adapted_bias(self, scales: Mapping[str, float]) -> Tensor | None:
        for name in scales:
            if name in self.heads:
                return self.heads[name][1]
        if self.bias is None:
            return None
        total = self.bias.clone()
        for name, scale in scales.items():
            numbers = self.on_bias.get(name)
            if numbers is None:
                continue
            C, D, E = numbers["C"], numbers["D"], numbers["E"]
            if C is not None:
                W0 = self.weight if self.prompted is None else self.prompted
                total = total + scale * (W0 @ C).squeeze(1)
            total = total + scale * (0 if D is None else self.bias * D) + scale * (0 if E is None else E)
        return total

    def names(self) -> set[str]:
        return {*self.on_weight, *self.on_bias, *self.heads}


@dataclass
class Expected:
    """The model: its layers, and the adapters that act with their scales."""

    layers: list[Layer]
    scales: dict[str, float] = field(default_factory=dict)

    @classmethod
    def plain(cls, model: nn.Sequential) -> Expected:
        return cls(
            [Layer(m.weight.detach().double(), m.bias if m.bias is None else m.bias.detach().double()) for m in model]
        )

    def copy(self) -> Expected:
        return copy.deepcopy(self)

    def names(self) -> set[str]:
        return set[str]().union(*(layer.names() for layer in self.layers))

    def run(self, x: Tensor, scales: Mapping[str, float] | None = None) -> Tensor:
        scales = self.scales if scales is None else scales
        for layer in self.layers:
            bias = layer.adapted_bias(scales)
            x = x @ layer.adapted_weight(scales).T + (0 if bias is None else bias)
        return x

    def heads_differ(self, scales: Mapping[str, float]) -> bool:
        """Whether the adapters that are to act have heads that are not equal."""
        head = self.layers[2]
        copies = [head.heads.get(name, (head.weight, head.bias)) for name in scales]
        return any(not torch.equal(a, b) for one in copies[1:] for a, b in zip(one, copies[0], strict=True))

    def take(self, model: nn.Sequential, name: str, config: glora.GLoRAConfig, targets: list[int], head: bool) -> None:
        """Take in an adapter that was attached, as the only one that acts."""
        tensors = glora.state_dict(model, name)
        for index in targets:
            layer, numbers = self.layers[index], numbers_of(tensors, str(index), config)
            layer.product[name] = config.product
            if numbers["A"] is not None or numbers["B"] is not None:
                layer.on_weight[name] = numbers
            if any(numbers[path] is not None for path in "CDE"):
                layer.on_bias[name] = numbers
                if layer.bias is None:
                    layer.created, layer.bias = True, torch.zeros(len(layer.weight), dtype=torch.float64)
        if head:
            self.layers[2].heads[name] = tensors["2.weight"].double().clone(), tensors["2.bias"].double().clone()
        self.scales = {name: 1.0}

    def forget(self, name: str) -> None:
        """Drop an adapter."""
        for layer in self.layers:
            for held in (layer.on_weight, layer.on_bias, layer.heads):
                held.pop(name, None)
            self.settle(layer)
        self.scales.pop(name, None)

    def settle(self, layer: Layer) -> None:
        """A created bias and a kept weight go with the last path that needs them."""
        if not layer.on_bias:
            layer.prompted = None
            if layer.created:
                layer.created, layer.bias = False, None
        present = self.names()
        self.scales = {name: scale for name, scale in self.scales.items() if name in present}
