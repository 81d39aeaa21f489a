r"""A layer's outputs and a low-rank update of them as one Function: `y = s * (x W0^T) + b + (x R^T) L^T`."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from glora.kernels.again import gradients, stand_in, wants_operations
from glora.precision import outside_autocast

# Note [One Function]
# As a chain of operations the update costs autograd a step for each, and a pass over activations for each sum: the
# gradient of x is the sum of two results. Here the second product adds to the first one in place, forward and backward.
# Saved are x, the thin product x R^T, and x W0^T where s asks for a gradient; under autocast, W0 itself and no narrow
# copy of it. In bfloat16 x W0^T is rounded, and so is the sum with the update, which `addmm_` makes in float32: the
# bias has to come after both, since beside a large one the first rounding would be coarse, and lose the update. The
# factors' gradients are then bfloat16's own.


def linear(x: Tensor, W0: Tensor, bias: Tensor | None, scale: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`scale * (x W0^T) + bias + (x right^T) left^T`, all of one dtype but W0 and bias.

    Args:
        x: `(tokens, in)`.
        W0: `(out, in)`, which asks for no gradient; under autocast it is wider, as is the bias.
        bias: `(out,)` or None.
        scale: `(out,)`, not in bfloat16; None for 1.
        left: `(out, r)`.
        right: `(r, in)`.

    Returns:
        `(tokens, out)`.
    """
    if not torch.is_grad_enabled():
        return _compute(x, W0, bias, scale, left, right)[0]
    apply: Any = _Joined.apply  # pyright: ignore - torch leaves it untyped
    return cast("Tensor", apply(x, W0, bias, scale, left, right))


def _compute(
    x: Tensor, W0: Tensor, bias: Tensor | None, scale: Tensor | None, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs, `x W0^T` (with the bias where nothing scales it), and `x right^T`."""
    last = x.dtype == torch.bfloat16  # the bias, Note [One Function]
    plain = y = F.linear(x, W0.to(x.dtype), bias if scale is None and not last else None)
    if scale is not None:
        y = y * scale if bias is None else torch.addcmul(bias, y, scale)
    thin = F.linear(x, right)
    y.addmm_(thin, left.T)
    return y.add_(bias) if last and bias is not None else y, plain, thin


def _chain(
    x: Tensor, W0: Tensor | None, bias: Tensor | None, scale: Tensor | None, left: Tensor, right: Tensor
) -> Tensor:
    """The same, less what no gradient depends on where W0 is None."""
    y = F.linear(F.linear(x, right), left)
    if W0 is not None:
        plain = F.linear(x, W0.to(x.dtype))
        y = y + (plain if scale is None else plain * scale)
    return y if bias is None else (y + bias).to(x.dtype)


class _Joined(torch.autograd.Function):
    # No `setup_context` (Note [Signature]).
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W0: Tensor, bias: Tensor | None, scale: Tensor | None, left: Tensor, right: Tensor
    ) -> Tensor:
        y, plain, thin = _compute(x, W0, bias, scale, left, right)
        asked = ctx.needs_input_grad
        ctx.bias_dtype = None if bias is None else bias.dtype
        frozen = W0 if asked[0] or asked[3] else None
        ctx.save_for_backward(x, frozen, scale, plain if asked[3] else None, thin if asked[4] else None, left, right)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,), asked = grads, ctx.needs_input_grad
        x, W0, scale, plain, thin, left, right = ctx.saved_tensors
        if wants_operations(g):
            bias = stand_in([len(left)], ctx.bias_dtype, g) if asked[2] else None
            return gradients(_chain, g, (x, W0, bias, scale, left, right), asked)
        dx = dbias = dscale = dleft = dright = buffer = None
        with outside_autocast(g):
            thin_g = g @ left
            if asked[3]:
                buffer = g * plain
                dscale = buffer.sum(0)
            if asked[0]:
                scaled = g if scale is None else torch.mul(g, scale, out=buffer)
                dx = (scaled @ W0.to(g.dtype)).addmm_(thin_g, right)
            if asked[2]:
                dbias = g.sum(0, dtype=ctx.bias_dtype)
            if asked[4]:
                dleft = (thin.T @ g).T  # r rows of `out` are quicker than `out` rows of r
            if asked[5]:
                dright = thin_g.T @ x
        return dx, None, dbias, dscale, dleft, dright
