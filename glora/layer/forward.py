"""nn.Linear's forward for an adapted layer, by the cheapest kernel; the same for samples of several adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from glora.kernels import select
from glora.layer.computed import adapter_weights_of, kernel_weight, tensor_of
from glora.layer.parametrization import AdapterWeights, live_parametrizations
from glora.matrices import Matrix


def linear_forward(matrix: Matrix) -> Callable[[nn.Module, Tensor], Tensor]:
    """The forward of a class that holds its weight as `matrix`."""

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        parametrizations, dropout = live_parametrizations(self), self.training
        adapter_weights = adapter_weights_of(self, parametrizations)
        for parametrization in parametrizations.values() if not input.is_meta else ():
            if parametrization.original.is_meta:
                raise _meta_error(self, input)
        bias = tensor_of(self, parametrizations, "bias", adapter_weights, dropout)
        store = kernel_weight(self, parametrizations, matrix)
        if store is None:
            weight = cast("Tensor", tensor_of(self, parametrizations, "weight", adapter_weights, dropout))
            return F.linear(input, matrix.read(weight), bias)
        W0 = matrix.read(parametrizations["weight"].original)
        return select.linear(input, W0, bias, store.factors(adapter_weights, dropout))

    return forward


def per_sample_forward(matrix: Matrix) -> Callable[..., Tensor | None]:
    """The same for samples of several adapters in one call; None where each adapter needs a call of its own."""

    def forward(self: nn.Module, input: Tensor, *, acting: Sequence[AdapterWeights], owner: Tensor) -> Tensor | None:
        parametrizations, dropout = live_parametrizations(self), self.training
        store = kernel_weight(self, parametrizations, matrix)
        if store is None:
            return None
        W0 = matrix.read(parametrizations["weight"].original)
        groups = [store.factors(adapter_weights, dropout) for adapter_weights in acting]
        if not select.can_mix(input, W0, groups):
            return None
        biases = [tensor_of(self, parametrizations, "bias", adapter_weights, dropout) for adapter_weights in acting]
        return select.linear_per_sample(input, W0, biases, groups, owner)

    return forward


def _meta_error(module: nn.Module, input: Tensor) -> RuntimeError:
    return RuntimeError(
        f"An adapted layer's tensors must be where its input is, {input.device}; they are on the meta device. "
        f"If accelerate has offloaded them, give its cpu_offload, disk_offload or dispatch_model "
        f"preload_module_classes=[{type(module).__name__!r}] (to serve: it trains nothing that is offloaded); "
        f"else give the model memory first (to_empty, and load)."
    )
