r"""A linear layer with a low-rank elementwise A, without W' ever being whole.

`W' = W0 + W0 * (L_A R_A) + L_B R_B` is made, used and forgotten a block of rows at a time, forward and backward, and
nothing is saved but the input and the factors: three matrix products a step, like a trained layer's (Note [Blocks]).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from glora import functional
from glora.functional import WeightFactors
from glora.kernels import blocks, frozen, opaque
from glora.kernels.again import gradients, stand_in, wants_operations
from glora.kernels.factored import scaled_inputs, sort_paths
from glora.tensors import dense, is_quantised


def linear(x: Tensor, W0: Tensor, bias: Tensor | None, adapters: Sequence[WeightFactors], dtype: torch.dtype) -> Tensor:
    """`x W'^T + bias` in blocks of rows of W0, which must not ask for a gradient.

    Args:
        x: `(..., in)`.
        W0: `(out, in)`.
        bias: `(out,)` or None.
        adapters: the adapters' paths.
        dtype: that of the products and of the result: x's, or autocast's.

    Returns:
        `(..., out)` in `dtype`.
    """
    A, inputs, B = sort_paths(W0, adapters, dtype)
    tensors: list[Tensor | None] = []
    for path in (*A, *B):
        left, right = path.tensors if isinstance(path.tensors, tuple) else (path.tensors, None)
        tensors += [left, right, path.scale]
    rows = x.reshape(-1, W0.shape[1])
    if torch.compiler.is_compiling() and not is_quantised(W0):
        flat = opaque.linear(rows, W0, bias, dtype, len(A), tensors)
    else:
        if torch.compiler.is_compiling():  # dynamo takes no tensor twice, and an adapter's A and B share a scale
            tensors[2::3] = [cast("Tensor", scale).clone() for scale in tensors[2::3]]
        apply: Any = _Blocked.apply  # pyright: ignore - torch leaves it untyped
        flat = cast("Tensor", apply(rows, W0, bias, dtype, len(A), *tensors))
    y = flat.reshape(*x.shape[:-1], W0.shape[0])
    return (y + frozen.linear(scaled_inputs(x, inputs), W0)).to(dtype) if inputs else y


class _Blocked(torch.autograd.Function):
    # No `setup_context` (Note [Signature]).
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W0: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        count: int,
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.dtype, ctx.count = dtype, count
        ctx.bias_dtype = None if bias is None else bias.dtype
        # Frozen factors need no x: it is not kept, and may be written over.
        ctx.x_shape = x.shape, x.dtype
        ctx.save_for_backward(x if any(ctx.needs_input_grad[5:]) else None, W0, *tensors)
        return blocks.forward(x, W0, bias, dtype, count, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, W0, *tensors = cast("tuple[Any, ...]", ctx.saved_tensors)
        if not torch.compiler.is_compiling() and wants_operations(g := grads[0]):
            shape, x_dtype = ctx.x_shape
            x = stand_in(shape, x_dtype, g) if x is None else x
            bias = stand_in([len(W0)], ctx.bias_dtype, g) if ctx.needs_input_grad[2] else None
            inputs: Any = (x, W0, bias, ctx.dtype, ctx.count, *tensors)
            return gradients(_through_whole, g.to(ctx.dtype), inputs, ctx.needs_input_grad)
        dx_dtype = ctx.x_shape[1] if ctx.needs_input_grad[0] else None
        dbias_dtype = ctx.bias_dtype if ctx.needs_input_grad[2] else None
        dx, dbias, dfactors = blocks.backward(grads[0], x, W0, ctx.dtype, ctx.count, tensors, dx_dtype, dbias_dtype)
        return (dx, None, dbias, None, None, *dfactors)


def _through_whole(
    x: Tensor, W0: Tensor, bias: Tensor | None, dtype: torch.dtype, count: int, *tensors: Tensor | None
) -> Tensor:
    """The same by a whole W'."""
    A, B = blocks.fold(W0, count, tensors)
    W = functional.add(dense(W0), [functional.weight_update(dense(W0), (A[0], A[1]), (B[0], B[1]) if B else None)])
    y = x.to(dtype) @ W.to(dtype).T
    return y if bias is None else (y + bias).to(dtype)
