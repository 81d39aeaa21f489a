"""What a small model must hold and compute all its life long, known apart from the library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import glora
from glora import GLoRAConfig
from tests.helpers.calls import FORMS

SIZES = {"first": (4, 3), "second": (3, 4), "head": (2, 3)}
ON = {"weight": "AB", "bias": "CDE"}
X = {n: torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (3, 4)}

CONFIGS = st.builds(
    GLoRAConfig,
    **{path: st.sampled_from(forms) for path, forms in FORMS.items()},
    rank=st.integers(1, 2),
    alpha=st.sampled_from([None, 1.0, 3.0]),
    product=st.sampled_from(["hadamard", "matmul"]),
    create_bias=st.booleans(),
    init=st.just("random"),
)


class Net(nn.Module):
    def __init__(self, without_bias: tuple[str, ...] = ("second",), dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, (o, i) in SIZES.items():
            self.add_module(name, nn.Linear(i, o, bias=name not in without_bias, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


@dataclass
class Layer:
    """The frozen tensors of a layer, bit by bit.

    Attributes:
        created: the bias is there for an adapter alone.
    """

    weight: Tensor
    bias: Tensor | None
    created: bool = False

    @property
    def has_own_bias(self) -> bool:
        return self.bias is not None and not self.created


@dataclass
class Adapter:
    """An adapter: the config of each layer, its tensors by the keys of `glora.state_dict`."""

    configs: dict[str, GLoRAConfig]
    tensors: dict[str, Tensor]
    trainable: bool = True

    def has(self, layer: str, tensor: str) -> bool:
        return any(is_on(key, layer, tensor) for key in self.tensors)

    def path(self, layer: str, path: str) -> Tensor | None:
        """A path as the matrix or vector that it stands for, in float64."""
        tensors = self.tensors
        if f"{layer}.{path}.left" in tensors:
            left, right = tensors[f"{layer}.{path}.left"].double(), tensors[f"{layer}.{path}.right"].double()
            return left @ right * self.scaling(layer) * tensors.get(f"{layer}.{path}.balance", 1)
        value = tensors.get(f"{layer}.{path}.value")
        return None if value is None else value.double()

    def scaling(self, layer: str) -> float:
        config = self.configs[layer]
        return 1.0 if config.alpha is None else config.alpha / config.rank

    def frozen_prompt(self, layer: str) -> Tensor | None:
        """W0 C in float64, where torch's removal has baked the weight in, and C is gone."""
        shift = self.tensors.get(f"{layer}.C.shift")
        is_low_rank = self.configs[layer].C == "lora" if layer in self.configs else False
        return None if shift is None else shift.double() * (self.scaling(layer) if is_low_rank else 1.0)


class Saved(NamedTuple):
    """An adapter in a folder, and which of the layers had a bias of their own."""

    folder: Path
    adapter: Adapter
    biases: dict[str, bool]


def is_on(key: str, layer: str, tensor: str) -> bool:
    """Whether a key of an adapter's state dict belongs to this tensor of the layer."""
    owner, _, rest = key.partition(".")
    return owner == layer and (rest == tensor or (len(rest) > 1 and rest[1] == "." and rest[0] in ON[tensor]))


def paths_for(layer: Layer, config: GLoRAConfig) -> str:
    """The paths of a config that this layer takes."""
    takes = "ABCDE" if layer.has_own_bias else "ABCE" if config.create_bias else "AB"
    return "".join(path for path in takes if config.forms[path] != "none")


Value = tuple[Tensor, Tensor]
"""A tensor in float64, and a bound of the terms that it is the sum of."""


@dataclass
class Subject:
    """A model, and what is known of it.

    Attributes:
        acting: the adapters that act, in the order that they were given in.
        flags: `requires_grad` of the base's parameters; `before`: as it was before the first adapter.
    """

    model: Net
    layers: dict[str, Layer]
    flags: dict[str, bool]
    adapters: dict[str, Adapter] = field(default_factory=dict)
    acting: dict[str, float] = field(default_factory=dict)
    before: dict[str, bool] | None = None
    checks: int = 0

    @classmethod
    def of(cls, model: Net) -> Subject:
        """A model without adapters."""
        layers = {name: Layer(*_bits(getattr(model, name))) for name in SIZES}
        return cls(model, layers, {key: p.requires_grad for key, p in model.named_parameters()})

    @property
    def dtype(self) -> torch.dtype:
        return self.layers["first"].weight.dtype

    @property
    def factor_dtype(self) -> torch.dtype:
        """Of an adapter that is attached now."""
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    @property
    def base(self) -> dict[str, Tensor]:
        """The base model's tensors."""
        found: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            found[f"{name}.weight"] = layer.weight
            if layer.bias is not None and not layer.created:
                found[f"{name}.bias"] = layer.bias
        return found

    def has(self, layer: str, tensor: str) -> bool:
        """Whether adapters are on this tensor."""
        return any(adapter.has(layer, tensor) for adapter in self.adapters.values())

    def acts(self, layer: str, tensor: str) -> bool:
        return any(self.adapters[name].has(layer, tensor) for name in self.acting)

    def has_frozen_prompt(self, layer: str) -> bool:
        return any(f"{layer}.C.shift" in adapter.tensors for adapter in self.adapters.values())

    def forms_the_head(self) -> bool:
        """Whether the head is adapted by paths, rather than trained as a whole."""
        return any(key.count(".") == 2 and key.startswith("head.") for a in self.adapters.values() for key in a.tensors)

    def trains_the_head(self) -> bool:
        """Whether adapters have copies of the head; torch's removal may have left them one of its tensors."""
        return any(key.count(".") == 1 for adapter in self.adapters.values() for key in adapter.tensors)

    def weight(self, name: str, acting: Mapping[str, float]) -> Value:
        """`W0 + sum_i w_i (W0 * A_i + B_i)`, or the copy of the adapter that acts."""
        layer = self.layers[name]
        W0 = layer.weight.double()
        value, bound = W0, W0.abs()
        for adapter, w in [(self.adapters[other], w) for other, w in acting.items()]:
            if f"{name}.weight" in adapter.tensors:
                value = adapter.tensors[f"{name}.weight"].double()
                return value, value.abs()
            A, B = adapter.path(name, "A"), adapter.path(name, "B")
            if A is not None:
                whole = adapter.configs[name].product == "matmul" and f"{name}.A.left" in adapter.tensors
                value = value + w * (W0 @ A if whole else W0 * A)
                bound = bound + abs(w) * (W0.abs() @ A.abs() if whole else W0.abs() * A.abs())
            if B is not None:
                value, bound = value + w * B, bound + abs(w) * B.abs()
        return value, bound

    def bias(self, name: str, acting: Mapping[str, float]) -> Value | None:
        """`b0 + sum_i w_i (b0 * D_i + E_i + W0 C_i)`, or the copy of the adapter that acts."""
        layer = self.layers[name]
        if layer.bias is None:
            return None
        W0, b0 = layer.weight.double(), layer.bias.double()
        value, bound = b0, b0.abs()
        for adapter, w in [(self.adapters[other], w) for other, w in acting.items()]:
            if f"{name}.bias" in adapter.tensors:
                value = adapter.tensors[f"{name}.bias"].double()
                return value, value.abs()
            C, D, E = (adapter.path(name, path) for path in "CDE")
            frozen = adapter.frozen_prompt(name)
            for term, size in (
                (None, None) if C is None else ((W0 @ C).squeeze(1), (W0.abs() @ C.abs()).squeeze(1)),
                (frozen, None if frozen is None else frozen.abs()),
                (None, None) if D is None else (b0 * D, (b0 * D).abs()),
                (E, None if E is None else E.abs()),
            ):
                if term is not None and size is not None:
                    value, bound = value + w * term, bound + abs(w) * size
        return value, bound

    def output(self, name: str, acting: Mapping[str, float]) -> Value:
        """Of the layer, for the input of its width."""
        x = X[SIZES[name][1]].to(self.dtype).double()
        (W, W_bound), b = self.weight(name, acting), self.bias(name, acting)
        y, bound = x @ W.T, x.abs() @ W_bound.T
        return (y, bound) if b is None else (y + b[0], bound + b[1])

    def run(self, name: str) -> Tensor:
        """What the layer gives for that input."""
        return getattr(self.model, name)(X[SIZES[name][1]].to(self.dtype))

    def close(self, found: Tensor, wanted: Value | None) -> None:
        assert wanted is not None
        value, bound = wanted
        assert found.dtype == self.dtype
        assert found.shape == value.shape
        error = (found.detach().double() - value).abs()
        assert (error <= 16 * torch.finfo(self.dtype).eps * bound + 1e-7).all(), (error, bound)

    def is_large(self) -> bool:
        """Whether baking in once more may come near the largest number of half precision."""
        return any(self.output(name, self.acting)[1].max() > 300 for name in SIZES)

    def check(self) -> None:
        """The model holds and computes what it must."""
        model = self.model
        self.checks += 1
        assert glora.adapters(model) == {name: self.acting.get(name, 0.0) for name in self.adapters}
        same(glora.base_state_dict(model), self.base)
        for name, adapter in self.adapters.items():
            same(glora.state_dict(model, name), adapter.tensors)
        with torch.set_grad_enabled(self.checks % 2 == 0):  # other kernels
            for name in SIZES:
                self.check_layer(name)
        self.check_flags()
        if not self.adapters:
            assert list(model.state_dict()) == list(self.base)

    def check_layer(self, name: str) -> None:
        module, parametrized = getattr(self.model, name), {tensor for tensor in ON if self.has(name, tensor)}
        assert set(getattr(module, "parametrizations", ())) == parametrized
        assert (type(module) is nn.Linear) is not parametrized
        self.close(module.weight, self.weight(name, self.acting))
        if self.layers[name].bias is None:
            assert module.bias is None
        else:
            self.close(module.bias, self.bias(name, self.acting))
        self.close(self.run(name), self.output(name, self.acting))

    def check_flags(self) -> None:
        """Factors of adapters that act ask for a gradient, heads where they act alone; the base's as known."""
        for name, adapter in self.adapters.items():
            for key, parameter in glora.named_parameters(self.model, name):
                is_head = key in ("head.weight", "head.bias")
                rivals = [other for other in self.acting if key in self.adapters[other].tensors] if is_head else [name]
                assert parameter.requires_grad is (adapter.trainable and name in self.acting and rivals == [name]), key
        assert {key: p.requires_grad for key, p in self.base_parameters().items()} == self.flags

    def base_parameters(self) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for name, layer in self.layers.items():
            module = getattr(self.model, name)
            for tensor in ("weight", "bias"):
                if tensor == "weight" or (layer.bias is not None and not layer.created):
                    adapted = parametrize.is_parametrized(module, tensor)
                    found[f"{name}.{tensor}"] = (
                        module.parametrizations[tensor].original if adapted else getattr(module, tensor)
                    )
        return found

    # What is done to the model, once it has been done.

    def attached(self, name: str, adapter: Adapter) -> None:
        for key in adapter.tensors:
            layer = self.layers[key.split(".")[0]]
            if layer.bias is None and is_on(key, key.split(".")[0], "bias"):
                layer.bias, layer.created = torch.zeros(len(layer.weight), dtype=self.dtype), True
        self.adapters[name] = adapter
        self.acting = {name: 1.0}
        self.before = self.flags if self.before is None else {**self.flags, **self.before}
        self.flags = dict.fromkeys(self.flags, False)

    def taken_off(self, layer: str, tensor: str, value: Tensor | None = None) -> None:
        """Adapters are off a tensor, for good; `value`: what is baked in, None for what was there before."""
        state = self.layers[layer]
        if tensor == "weight":
            half_removed = parametrize.is_parametrized(getattr(self.model, layer), "bias")
            if value is not None and half_removed and self.acts(layer, "weight"):
                for name, adapter in self.adapters.items():
                    self._freeze_prompt(layer, name, adapter)
            state.weight = state.weight if value is None else value
        else:
            state.bias = state.bias if value is None else value
            state.created = False
            self.flags.setdefault(f"{layer}.bias", False)
        for adapter in self.adapters.values():
            adapter.tensors = {key: t for key, t in adapter.tensors.items() if not is_on(key, layer, tensor)}
        self.adapters = {name: adapter for name, adapter in self.adapters.items() if adapter.tensors}
        self.acting = {name: w for name, w in self.acting.items() if name in self.adapters}

    def _freeze_prompt(self, layer: str, name: str, adapter: Adapter) -> None:
        """The model has the vector W0 C in place of C."""
        W0, C = self.layers[layer].weight.double(), adapter.path(layer, "C")
        if C is not None:
            module = getattr(self.model, layer).parametrizations.bias[0].get_submodule(name)
            adapter.tensors[f"{layer}.C.shift"] = module.C.shift.clone()
            found, bound = adapter.frozen_prompt(layer), (W0.abs() @ C.abs()).squeeze(1)
            assert found is not None
            eps = torch.finfo(module.C.shift.dtype).eps
            assert ((found - (W0 @ C).squeeze(1)).abs() <= 16 * eps * bound + 1e-7).all()
            gone = ("left", "right", "value")
            adapter.tensors = {k: t for k, t in adapter.tensors.items() if k not in [f"{layer}.C.{g}" for g in gone]}

    def dropped(self, name: str) -> None:
        del self.adapters[name]
        self.acting.pop(name, None)
        self._forget_unused()

    def freed(self) -> None:
        """All adapters are off, and flags are back."""
        self.adapters, self.acting = {}, {}
        self._forget_unused()
        if self.before is not None:
            self.flags = {key: self.before.get(key, flag) for key, flag in self.flags.items()}
        self.before = None

    def _forget_unused(self) -> None:
        for name, layer in self.layers.items():
            if not self.has(name, "bias"):
                layer.bias = None if layer.created else layer.bias
                layer.created = False

    def converted(self, dtype: torch.dtype) -> None:
        for layer in self.layers.values():
            layer.weight = layer.weight.to(dtype)
            layer.bias = None if layer.bias is None else layer.bias.to(dtype)
        for adapter in self.adapters.values():
            adapter.tensors = {key: tensor.to(dtype) for key, tensor in adapter.tensors.items()}


def _bits(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone()


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """The same keys, dtypes and bits."""
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        assert tensor.dtype == wanted[key].dtype, key
        assert torch.equal(tensor, wanted[key]), key
