"""What the tests of kernels share."""

from __future__ import annotations

import torch
from hypothesis import currently_in_test_context
from torch import Tensor, nn

from glora import GLoRAConfig
from tests.helpers import internals
from tests.helpers.calls import factors_of
from tests.helpers.strategies import tally

# A config for each kind of kernel.
KINDS = {
    "lora": GLoRAConfig.glora(init="random", rank=2),
    "factored": GLoRAConfig.glora(A="vector", init="random", rank=2),
    "matmul": GLoRAConfig.glora(product="matmul", init="random", rank=2),
    "matmul vector": GLoRAConfig.glora(A="vector", product="matmul", init="random"),
}


def call_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's output; an example of hypothesis counts under the kernel that was taken."""
    if torch.compiler.is_compiling() or not currently_in_test_context():
        return layer(x)
    with internals.kernels_taken() as taken:
        y = layer(x)
    for kernel in set(taken):
        tally("kernel", kernel)
    return y


def run_kernel(layer: nn.Module, x: Tensor, kernel: internals.Kernel | None, grad: bool = True) -> list[Tensor]:
    """Output, and the gradients of the input and of every factor."""
    with internals.force_kernel(kernel), torch.set_grad_enabled(grad):
        y = call_layer(layer, x)
        if not grad:
            return [y]
        torch.manual_seed(0)
        sources = [x, *factors_of(layer)]
        # A factor that is multiplied by nothing (no tokens) may have no gradient at all.
        grads = torch.autograd.grad(y, sources, torch.randn_like(y), allow_unused=True)
        return [y, *(torch.zeros_like(s) if g is None else g for s, g in zip(sources, grads, strict=True))]
