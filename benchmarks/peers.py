"""One layer each of glora's main forms and of other libraries, made the same way and ready to train.

Every factory takes `(in_features, out_features, rank, dtype, device)` and returns a module `(..., in) -> (..., out)`
with a frozen W0 and bias; its trainable parameters are those that require a gradient. Other libraries are set up as
their own documentation does, and imported only when asked for.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import glora

Factory: TypeAlias = Callable[[int, int, int, torch.dtype, torch.device], nn.Module]


def needs(name: str) -> Any:
    """The module of this name, or an error that names the extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"This benchmark needs {name.partition('.')[0]!r}, which cannot be imported ({error}). "
            f'Install the extra: pip install "glora[benchmarks]".'
        ) from error


def _linear(in_features: int, out_features: int, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    return nn.Linear(in_features, out_features, dtype=dtype, device=device).requires_grad_(False)


# --- glora and plain torch ---------------------------------------------------------------------------------------


def _glora(*, adapters: int = 1, merged: bool = False, **options: Any) -> Factory:
    def make(in_features: int, out_features: int, rank: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
        layer: nn.Module = _linear(in_features, out_features, dtype, device)
        config = glora.GLoRAConfig.glora(**options, rank=rank)
        names = [f"adapter{number}" for number in range(adapters)]
        for name in names:
            glora.apply(layer, config=config, name=name)
        if merged:
            return glora.merge(layer)
        return glora.activate(layer, dict.fromkeys(names, 1.0))

    return make


def _torch_linear(*, trained: bool) -> Factory:
    def make(in_features: int, out_features: int, rank: int, dtype: torch.dtype, device: torch.device) -> nn.Module:  # noqa: ARG001
        return _linear(in_features, out_features, dtype, device).requires_grad_(trained)

    return make


class _Whole(nn.Module):
    """`W0 + W0 * A + B` with every product written out, as the authors' layer and as minLoRA compute their weights."""

    def __init__(self, weight: Tensor, rank: int, *, scales: bool) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        for name in ("A", "B") if scales else ("B",):
            setattr(self, f"{name}_left", nn.Parameter(weight.new_zeros(out_features, rank)))
            right = nn.Parameter(weight.new_empty(rank, in_features))
            setattr(self, f"{name}_right", right)
            nn.init.kaiming_uniform_(right, a=math.sqrt(5))
        self.scales = scales

    def forward(self, weight: Tensor) -> Tensor:
        update = self.B_left @ self.B_right
        return weight + weight * (self.A_left @ self.A_right) + update if self.scales else weight + update


def _parametrized(*, scales: bool) -> Factory:
    def make(in_features: int, out_features: int, rank: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
        layer = _linear(in_features, out_features, dtype, device)
        parametrize.register_parametrization(layer, "weight", _Whole(layer.weight, rank, scales=scales))
        return layer

    return make


# --- PEFT and LyCORIS --------------------------------------------------------------------------------------------


def peft_model(model: nn.Module, config: str, rank: int, *, adapters: int = 1, **options: Any) -> nn.Module:
    """A model with PEFT's adapters, all of them active: `config` is the name of the config's class in `peft`."""
    peft = needs("peft")
    # LoraConfig's update is scaled by alpha / rank, and alpha is 8 unless told.
    options |= {"lora_alpha": rank} if config == "LoraConfig" else {}
    made = getattr(peft, config)(r=rank, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of target_modules that only a saved adapter would miss
        wrapped = peft.get_peft_model(model, made)
        names = ["default", *(f"adapter{number}" for number in range(1, adapters))]
        for name in names[1:]:
            wrapped.add_adapter(name, made)
        if adapters > 1:
            wrapped.base_model.set_adapter(names)
    return wrapped


def _peft(config: str, *, adapters: int = 1, **options: Any) -> Factory:
    def make(in_features: int, out_features: int, rank: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
        model = nn.Sequential(_linear(in_features, out_features, dtype, device))
        wrapped = peft_model(model, config, rank, adapters=adapters, target_modules=["0"], **options)
        # The adapted layer alone, as glora's: PEFT's wrappers around a model cost time that a large one does not feel.
        return wrapped.base_model.model[0]

    return make


class _Lycoris(nn.Module):
    """A layer and its LyCORIS adapter, which knows the layer but does not hold it."""

    def __init__(self, layer: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.layer, self.adapter = layer, adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(x)


def _lycoris(*, bypass: bool) -> Factory:
    def make(in_features: int, out_features: int, rank: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
        layer = _linear(in_features, out_features, dtype, device)
        module = needs("lycoris.modules.glora").GLoRAModule
        adapter = module("layer", layer, lora_dim=rank, alpha=rank, bypass_mode=bypass)
        # LyCORIS computes in the factors' own dtype, and refuses one that is not the layer's.
        return _Lycoris(layer, adapter.to(device=device, dtype=dtype))

    return make


GLORA_A = "glora A=lora"
GLORA_DEFAULT = "glora default"
GLORA_VECTOR = "glora A=vector B=lora"
GLORA_B = "glora B=lora"
GLORA_MERGED = "glora merged"
FROZEN = "nn.Linear frozen"
TRAINED = "nn.Linear trained"
PEFT_GLORA = "PEFT GLoRA"
PEFT_LORA = "PEFT LoRA"

_NO_BIAS_PATHS: dict[str, Any] = {"C": "none", "D": "none", "E": "none"}

PEERS: dict[str, Factory] = {
    GLORA_A: _glora(A="lora", B="none", **_NO_BIAS_PATHS),
    GLORA_DEFAULT: _glora(),
    GLORA_VECTOR: _glora(A="vector", B="lora", **_NO_BIAS_PATHS),
    GLORA_B: _glora(A="none", B="lora", **_NO_BIAS_PATHS),
    "glora A=lora matmul": _glora(A="lora", B="none", product="matmul", **_NO_BIAS_PATHS),
    "glora default x4": _glora(adapters=4),
    GLORA_MERGED: _glora(merged=True),
    FROZEN: _torch_linear(trained=False),
    TRAINED: _torch_linear(trained=True),
    PEFT_GLORA: _peft("GloraConfig"),
    "PEFT GLoRA vector": _peft("GloraConfig", config_A_B="vector"),
    "PEFT GLoRA x4": _peft("GloraConfig", adapters=4),
    PEFT_LORA: _peft("LoraConfig"),
    "PEFT HiRA": _peft("HiraConfig"),
    "PEFT DoRA": _peft("LoraConfig", use_dora=True),
    "LyCORIS GLoRA": _lycoris(bypass=False),
    "LyCORIS GLoRA bypass": _lycoris(bypass=True),
    "authors": _parametrized(scales=True),
    "minLoRA": _parametrized(scales=False),
}


def make(name: str, in_features: int, out_features: int, rank: int, dtype: torch.dtype, device: str) -> nn.Module:
    """The peer of this name, with the same W0 for every peer."""
    torch.manual_seed(0)
    return PEERS[name](in_features, out_features, rank, dtype, torch.device(device))
