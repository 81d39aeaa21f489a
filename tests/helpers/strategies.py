"""The space the invariants are tested over: forms, products, shapes, dtypes, bias or none, one to three adapters."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from hypothesis import currently_in_test_context, event
from hypothesis import strategies as st
from torch import Tensor, nn

import glora
from tests.helpers import reference
from tests.helpers.calls import FORMS, attach

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]


def tally(aspect: str, value: object) -> None:
    """Count an example under a value of some aspect, for `pytest --hypothesis-show-statistics`."""
    if currently_in_test_context():
        event(f"{aspect}: {value}")


@st.composite
def configs(
    draw: st.DrawFn,
    init: str = "random",
    needs: str = "AB",
    bias_path: bool = False,
    elementwise: bool | None = None,
    create_bias: bool | None = None,
) -> glora.GLoRAConfig:
    """Any config with at least one path of `needs`: by default on the weight, so that it can be attached to any layer.

    Args:
        init: how factors start.
        needs: paths of which one at least is there.
        bias_path: C or E, which need no bias of the layer's own, is there too.
        elementwise: whether A is low rank and multiplied elementwise, the form of a kernel of its own; None draws it.
        create_bias: None draws it.
    """
    forms = {path: draw(st.sampled_from(allowed)) for path, allowed in FORMS.items()}
    for paths in [needs, *(["CE"] if bias_path else [])]:
        if all(forms[path] == "none" for path in paths):
            path = draw(st.sampled_from(paths))
            forms[path] = draw(st.sampled_from(FORMS[path][:-1]))
    product = draw(st.sampled_from(["hadamard", "matmul"]))
    if elementwise:
        forms["A"], product = "lora", "hadamard"
    elif elementwise is False and forms["A"] == "lora":
        product = "matmul"
    return glora.GLoRAConfig.glora(
        **forms,
        rank=draw(st.integers(1, 4)),
        alpha=draw(st.sampled_from([None, 1.0, 6.0])),
        product=product,
        init=init,
        create_bias=draw(st.booleans()) if create_bias is None else create_bias,
    )


@dataclass(frozen=True)
class Case:
    """A layer and the adapters to attach to it; `build` makes it, the same each time."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    bias: bool
    configs: tuple[glora.GLoRAConfig, ...]
    weights: tuple[float, ...]
    seed: int

    @property
    def named_weights(self) -> dict[str, float]:
        return {f"a{i}": weight for i, weight in enumerate(self.weights)}

    def plain(self) -> nn.Linear:
        torch.manual_seed(self.seed)
        return nn.Linear(self.in_features, self.out_features, bias=self.bias, dtype=self.dtype)

    def build(self) -> nn.Linear:
        layer = self.plain()
        for i, config in enumerate(self.configs):
            attach(layer, config, name=f"a{i}")
        return glora.activate(layer, self.named_weights)

    def input(self, *batch: int) -> Tensor:
        torch.manual_seed(self.seed + 1)
        return torch.randn(*(batch or (5,)), self.in_features, dtype=self.dtype)


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: list[torch.dtype] = DTYPES,
    min_adapters: int = 1,
    max_adapters: int = 3,
    max_size: tuple[int, int] = (33, 17),
    both_tensors: bool = False,
    elementwise: bool | None = None,
    create_bias: bool | None = None,
) -> Case:
    """Any case.

    Args:
        dtypes: of the layer.
        min_adapters, max_adapters: how many there are.
        max_size: largest (out, in).
        both_tensors: weight and bias are both parametrized.
        elementwise: whether the first adapter's A is low rank and multiplied elementwise (False: no adapter's is); None
            draws it, evenly.
        create_bias: of every adapter; None draws it.
    """
    bias = draw(st.booleans())
    first = configs(
        bias_path=both_tensors,
        elementwise=elementwise,
        create_bias=True if both_tensors and not bias else create_bias,
    )
    others = configs(create_bias=create_bias, elementwise=False if elementwise is False else None)
    out_features, in_features = draw(st.integers(1, max_size[0])), draw(st.integers(1, max_size[1]))
    chosen = [draw(first), *(draw(others) for _ in range(max_adapters - 1))]
    weights = tuple(draw(st.sampled_from([1.0, 0.7, -0.5, 2.0])) for _ in range(max_adapters))
    seed = draw(st.integers(0, 2**16))
    # What every example should have its share of goes by all the rest: hypothesis makes most examples out of earlier
    # ones, and would repeat a small choice of its own in them (one dtype of four in 2 of 60).
    share = random.Random(repr((bias, out_features, in_features, chosen, weights, seed)))
    count, dtype = share.randint(min_adapters, max_adapters), share.choice(dtypes)
    if elementwise is None and share.random() < 0.5:
        chosen[0] = replace(chosen[0], A="lora", product="hadamard")
    tally("adapters", count)
    tally("dtype", dtype)
    return Case(out_features, in_features, dtype, bias, tuple(chosen[:count]), weights[:count], seed)


def factors(layer: nn.Module, name: str, config: glora.GLoRAConfig) -> dict[str, reference.Path]:
    """One adapter's paths as the reference takes them, alpha / rank included, read from its state dict."""
    tensors = glora.state_dict(layer, name)
    paths: dict[str, reference.Path] = {}
    for path in FORMS:
        if f"{path}.left" in tensors:
            scale = config.scaling * tensors.get(f"{path}.balance", 1)
            paths[path] = (tensors[f"{path}.left"] * scale, tensors[f"{path}.right"])
        else:
            paths[path] = tensors.get(f"{path}.value")
    return paths


def expected(layer: nn.Module, case: Case, W0: Tensor, b0: Tensor | None) -> tuple[Tensor, Tensor]:
    """W' and b' of a case by the reference, in float64, from the adapters that are there."""
    parts = [
        (weight, config, factors(layer, name, config))
        for (name, weight), config in zip(case.named_weights.items(), case.configs, strict=True)
        if name in glora.adapters(layer)
    ]
    weight = reference.weight(W0, [(w, p["A"], p["B"], config.product) for w, config, p in parts])
    bias = reference.bias(W0, b0, [(w, p["C"], p["D"], p["E"]) for w, _, p in parts])
    return weight, bias


def close(actual: Tensor, wanted: Tensor, ulps: float = 8.0) -> bool:
    """Equal to within some units of the last place of actual's dtype, at the size of the largest entry."""
    scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    # Half precision is rounded once; float32 arithmetic before it is as good as exact.
    bound = ulps * torch.finfo(actual.dtype).eps * scale
    return actual.shape == wanted.shape and bool(((actual.double() - wanted.double()).abs() <= bound).all())
