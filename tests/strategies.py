"""The space the invariants are tested over: forms, products, shapes, dtypes, bias or none, one to three adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import glora
from glora.config import FORMS
from tests import reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@st.composite
def configs(draw: st.DrawFn, init: str = "random") -> glora.GLoRAConfig:
    """Any config with at least one path on the weight, so that it can be attached to any layer."""
    forms = {path: draw(st.sampled_from(allowed)) for path, allowed in FORMS.items()}
    if forms["A"] == forms["B"] == "none":
        forms[draw(st.sampled_from("AB"))] = draw(st.sampled_from(["lora", "vector", "constant"]))
    return glora.GLoRAConfig(
        **forms,
        rank=draw(st.integers(1, 4)),
        alpha=draw(st.sampled_from([None, 1.0, 6.0])),
        product=draw(st.sampled_from(["hadamard", "matmul"])),
        init=init,
        create_bias=draw(st.booleans()),
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
    def strengths(self) -> dict[str, float]:
        return {f"a{i}": weight for i, weight in enumerate(self.weights)}

    def plain(self) -> nn.Linear:
        torch.manual_seed(self.seed)
        return nn.Linear(self.in_features, self.out_features, bias=self.bias, dtype=self.dtype)

    def build(self) -> nn.Linear:
        layer = self.plain()
        for i, config in enumerate(self.configs):
            silent_apply(layer, config=config, name=f"a{i}")
        return glora.activate(layer, self.strengths)

    def input(self, *batch: int) -> Tensor:
        torch.manual_seed(self.seed + 1)
        return torch.randn(*(batch or (5,)), self.in_features, dtype=self.dtype)


@st.composite
def cases(
    draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES, max_adapters: int = 3, max_size: tuple[int, int] = (33, 17)
) -> Case:
    count = draw(st.integers(1, max_adapters))
    return Case(
        draw(st.integers(1, max_size[0])),
        draw(st.integers(1, max_size[1])),
        draw(st.sampled_from(dtypes)),
        draw(st.booleans()),
        tuple(draw(configs()) for _ in range(count)),
        tuple(draw(st.sampled_from([1.0, 0.7, -0.5, 2.0])) for _ in range(count)),
        draw(st.integers(0, 2**16)),
    )


def silent_apply(layer: nn.Module, **arguments: object) -> nn.Module:
    """`glora.apply` without its warning about layers that have no bias."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return glora.apply(layer, **arguments)


def factors(layer: nn.Module, name: str, config: glora.GLoRAConfig) -> dict[str, reference.Path]:
    """One adapter's paths as the reference takes them, alpha / rank included, read from its state dict."""
    tensors = glora.state_dict(layer, name)
    paths: dict[str, reference.Path] = {}
    for path in FORMS:
        if f"{path}.left" in tensors:
            paths[path] = (tensors[f"{path}.left"] * config.scaling, tensors[f"{path}.right"])
        else:
            paths[path] = tensors.get(f"{path}.value")
    return paths


def expected(layer: nn.Module, case: Case, W0: Tensor, b0: Tensor | None) -> tuple[Tensor, Tensor]:
    """W' and b' of a case by the reference, in float64."""
    return expected_of(layer, dict(zip(case.strengths, case.configs, strict=True)), case.strengths, W0, b0)


def expected_of(
    layer: nn.Module,
    configs: Mapping[str, glora.GLoRAConfig],
    strengths: Mapping[str, float],
    W0: Tensor,
    b0: Tensor | None,
) -> tuple[Tensor, Tensor]:
    parts = [(w, configs[name], factors(layer, name, configs[name])) for name, w in strengths.items()]
    weight = reference.weight(W0, [(w, p["A"], p["B"], config.product) for w, config, p in parts])
    bias = reference.bias(W0, b0, [(w, p["C"], p["D"], p["E"]) for w, _, p in parts])
    return weight, bias


def close(actual: Tensor, wanted: Tensor, ulps: float = 8.0) -> bool:
    """Equal to within some units of the last place of actual's dtype, at the size of the largest entry."""
    scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    # Half precision is rounded once; float32 arithmetic before it is as good as exact.
    bound = ulps * torch.finfo(actual.dtype).eps * scale
    return actual.shape == wanted.shape and bool(((actual.double() - wanted.double()).abs() <= bound).all())
