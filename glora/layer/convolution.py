"""A convolution's forward in half precision: the update is not rounded into W'."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from glora import functional
from glora.kernels.select import result_dtype
from glora.layer.computed import adapter_weights_of, caching_reads, kernel_weight, tensor_of
from glora.layer.parametrization import live_parametrizations
from glora.precision import is_half

# Note [Convolutions in half precision]
# A convolution is linear in its channels as nn.Linear is in its features: W0 and the update stand beside each other in
# one convolution of twice the channels, `[x, x] * [W0, dW] + bias`, each rounded at its own size, and the outputs once
# (Note [Late terms]). That costs a second convolution. With gradients it gives the values alone, and W' the gradients,
# as in a linear layer: a training step costs five convolutions in place of three. Transposed convolutions, which are
# reached by `register_matrix` alone, keep their own forward: torch adds up their outputs in half precision.


def convolution_forward(base: type[nn.Module]) -> Callable[..., Tensor]:
    """The forward of torch's convolution `base`."""
    plain = caching_reads(base.forward)

    def forward(self: Any, input: Tensor) -> Tensor:
        parametrizations = live_parametrizations(self)
        store = kernel_weight(self, parametrizations)
        if store is None:
            return plain(self, input)
        W0: Tensor = parametrizations["weight"].original
        dtype = result_dtype(input, W0)
        if dtype is None or not is_half(dtype) or type(W0) not in (nn.Parameter, Tensor):
            return plain(self, input)
        adapter_weights = adapter_weights_of(self, parametrizations)
        bias = tensor_of(self, parametrizations, "bias", adapter_weights)
        updates = store.updates(W0, store.factors(adapter_weights))
        if not updates:
            return self._conv_forward(input, W0, bias)
        with torch.no_grad():
            late = self._conv_forward(*_beside(self, input, W0, reduce(add, updates)), bias)
        if not torch.is_grad_enabled():
            return late
        y = self._conv_forward(input, functional.add(W0, updates), bias)
        return y + torch.where(late == y, 0, late - y).detach()  # both may be infinite

    return forward


def _beside(module: Any, x: Tensor, W0: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """`[x, x]` and `[W0, dW]`, within each group of channels."""
    channels = x.ndim - len(module.kernel_size) - 1
    groups = x.tensor_split(module.groups, channels)
    x = torch.cat([part for group in groups for part in (group, group)], channels)
    return x, torch.cat([W0, update.to(W0.dtype)], 1)
