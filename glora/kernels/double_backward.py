"""Gradients of gradients, for a Function whose backward pass is written by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from glora.precision import outside_autocast
from glora.torch_internals import in_transform, is_mapped

# Note [No setup_context]
# For a Function with a `setup_context`, torch looks up the signature of `forward` by `inspect` at each call: a tenth of
# a millisecond. Only torch.func's transforms need it. A Function that they never reach takes `ctx` in `forward`.


def is_differentiated(g: Tensor) -> bool:
    """Whether this backward pass is itself differentiated (create_graph) or mapped (`is_grads_batched`)."""
    return torch.is_grad_enabled() or is_mapped(g) or in_transform()


def placeholder(shape: Sequence[int], dtype: torch.dtype, g: Tensor) -> Tensor:
    """Stands for an input that was not saved, since no gradient depends on its values."""
    return torch.zeros(shape, dtype=dtype, device=g.device, requires_grad=True)


def gradients(compute: Callable[..., Tensor], g: Tensor, inputs: Sequence[Any], wanted: Sequence[bool]) -> Any:
    """The gradients of `compute(*inputs)`, a tuple with None for those that are not wanted.

    Args:
        compute: the Function's result, in operations that autograd can differentiate again and vmap can map.
        g: the gradient of that result.
        inputs: the Function's inputs.
        wanted: for each input, whether its gradient is wanted.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), outside_autocast(g):
        # Aliases: one input may come from another through an earlier layer, and that path is not this function's.
        aliases = [each.view_as(each) if want else each for each, want in zip(inputs, wanted, strict=True)]
        sources = [alias for alias, want in zip(aliases, wanted, strict=True) if want]
        grads = torch.autograd.grad(compute(*aliases), sources, g, create_graph=create_graph) if sources else ()
    rest = iter(grads)
    return tuple(next(rest) if want else None for want in wanted)
