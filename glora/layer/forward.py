"""nn.Linear's and nn.Embedding's forward for an adapted layer; nn.Linear's for samples of several adapters too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glora import functional
from glora.functional import Factors, WeightFactors
from glora.kernels import select
from glora.layer.computed import adapter_weights_of, caching_reads, kernel_weight, tensor_of
from glora.layer.lone_lora import lone_lora
from glora.layer.parametrization import AdapterWeights, live_parametrizations
from glora.matrices import EMBEDDING, Matrix
from glora.torch_internals import is_tracing


def linear_forward(matrix: Matrix) -> Callable[[nn.Module, Tensor], Tensor]:
    """The forward of a class that holds its weight as `matrix`."""

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        if (lora := lone_lora(self, input)) is not None:
            return select.lone_lora(input, *lora)
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


# Note [Rows looked up]
# An embedding's W is `(tokens, features)`. A call needs the rows of its tokens alone, and every path of W' is known row
# by row: the row i of `left @ right` is `left[i] @ right`, that of a vector its own number, and a path A of a matrix
# product multiplies the row from the right. So rows of W0 and of the left factors are looked up and the formula acts on
# them; no W' is made. A token at `padding_idx` has its row as any other, and takes no gradient, as in nn.Embedding.
def embedding_forward(base: type[nn.Module]) -> Callable[[nn.Module, Tensor], Tensor]:
    """The forward of a class that looks rows up, on the rows of its input (Note [Rows looked up])."""
    plain = caching_reads(base.forward)

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        parametrizations, padding = live_parametrizations(self), cast("nn.Embedding", self).padding_idx
        store = kernel_weight(self, parametrizations, EMBEDDING)
        if store is None:
            return plain(self, input)
        W0, adapter_weights = parametrizations["weight"].original, adapter_weights_of(self, parametrizations)
        if W0.is_meta and not input.is_meta:
            raise _meta_error(self, input)
        tokens = input.flatten()
        rows = F.embedding(tokens, W0, padding)
        adapters = [_rows_of(adapter, tokens) for adapter in store.factors(adapter_weights, self.training)]
        adapted = functional.adapted_weight(rows, adapters)
        if padding is not None and adapters and (torch.is_grad_enabled() or is_tracing()):
            adapted = torch.where((tokens == padding).unsqueeze(1), adapted.detach(), adapted)
        return adapted.view(*input.shape, rows.shape[1])

    return forward


def _rows_of(adapter: WeightFactors, tokens: Tensor) -> WeightFactors:
    """An adapter's paths on the rows of these tokens."""

    def looked_up(path: Factors | None) -> Factors | None:
        if path is None:
            return None
        if isinstance(path.tensors, tuple):
            left, right = path.tensors
            return Factors((F.embedding(tokens, left), right), path.scale)
        return Factors(F.embedding(tokens, path.tensors), path.scale) if path.tensors.ndim > 1 else path

    A = adapter.A if adapter.product == "matmul" else looked_up(adapter.A)
    return WeightFactors(A, looked_up(adapter.B), adapter.product)


def per_sample_forward(matrix: Matrix) -> Callable[..., Tensor | None]:
    """The same for samples of several adapters in one call; None where each adapter needs a call of its own."""

    def forward(self: nn.Module, input: Tensor, *, acting: Sequence[AdapterWeights], owner: Tensor) -> Tensor | None:
        parametrizations, dropout = live_parametrizations(self), self.training
        store = kernel_weight(self, parametrizations, matrix)
        if store is None:
            return None
        W0 = matrix.read(parametrizations["weight"].original)
        groups = [store.factors(adapter_weights, dropout) for adapter_weights in acting]
        apart = select.needing_a_call(input, W0, groups)
        if apart is None:
            return None
        biases = [tensor_of(self, parametrizations, "bias", adapter_weights, dropout) for adapter_weights in acting]
        return select.linear_per_sample(input, W0, biases, groups, owner, apart)

    return forward


def _meta_error(module: nn.Module, input: Tensor) -> RuntimeError:
    return RuntimeError(
        f"An adapted layer's tensors must be where its input is, {input.device}; they are on the meta device. "
        f"If accelerate has offloaded them, give its cpu_offload, disk_offload or dispatch_model "
        f"preload_module_classes=[{type(module).__name__!r}] (to serve: it trains nothing that is offloaded); "
        f"else give the model memory first (to_empty, and load)."
    )
