"""Gradients in operations of torch's own, for a Function whose backward pass is written by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from glora.precision import outside_autocast

# Note [Signature]
# A Function with a `setup_context` has forward's signature looked up by `inspect` at each call: a tenth of a
# millisecond. It is for torch.func's transforms; a Function that they never reach takes its `ctx` in forward.


def in_transform() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, for which such a Function has no rule."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0  # pyright: ignore


def wants_operations(g: Tensor) -> bool:
    """Whether a backward pass must be differentiable itself (create_graph), or mapped (`is_grads_batched`)."""
    functorch: Any = torch._C  # pyright: ignore - torch leaves it untyped
    return torch.is_grad_enabled() or functorch._functorch.is_legacy_batchedtensor(g) or in_transform()


def stand_in(shape: Sequence[int], dtype: torch.dtype, g: Tensor) -> Tensor:
    """Something to differentiate by, in place of an input that was not saved since no gradient depends on it."""
    return torch.zeros(shape, dtype=dtype, device=g.device, requires_grad=True)


def gradients(compute: Callable[..., Tensor], g: Tensor, inputs: Sequence[Any], wanted: Sequence[bool]) -> Any:
    """The gradients of `compute(*inputs)`, a tuple with None for what is not wanted.

    Args:
        compute: the Function's result, in operations that autograd can differentiate again and vmap can map.
        g: the gradient of that result.
        inputs: the Function's.
        wanted: for each of them, whether its gradient is.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad(), outside_autocast(g):
        # Aliases: one input may come from another, through an earlier layer, and that path is not this function's.
        aliases = [each.view_as(each) if asked else each for each, asked in zip(inputs, wanted, strict=True)]
        sources = [alias for alias, asked in zip(aliases, wanted, strict=True) if asked]
        found = iter(torch.autograd.grad(compute(*aliases), sources, g, create_graph=again) if sources else ())
    return tuple(next(found) if asked else None for asked in wanted)
