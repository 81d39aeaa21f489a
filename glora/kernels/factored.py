"""Layers whose forms need no W': `y = (1 + a) * (x W0^T) + b' + (x R^T) L^T`."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from glora.kernels import row_blocks
from glora.kernels.double_backward import gradients, is_differentiated, placeholder
from glora.kernels.terms import Pair, Terms
from glora.precision import as_dtype, is_half, multiply, outside_autocast, wide, working_dtype
from glora.tensors import is_quantised
from glora.torch_internals import has_half_units, in_transform, is_traced, is_tracing

# Note [In place]
# A pass over the outputs costs a few percent of the product that they come from: the number of passes is what sets one
# way of writing this apart from another. So the outputs are computed once and then added to in place, the shift by the
# thin product itself (`addmm_`). Autograd allows it: neither a product nor a sum saves its result, so that nothing that
# is saved is written over. Under torch.func's transforms a factor may be batched where the outputs are not, and then
# cannot be added to them in place. Under torch.compile it makes no difference.


def linear(x: Tensor, W0: Tensor, bias: Tensor | None, terms: Terms, dtype: torch.dtype) -> Tensor:
    """`x W'^T + bias` without W' (Note [Kernels]).

    Args:
        x: `(tokens, in)`.
        W0: frozen weight, `(out, in)`.
        bias: the adapted bias, `(out,)`, or None.
        terms: of the adapters; where they scale entries, rescaled copies of x go through W0.
        dtype: of the product with W0 and of the result.

    Returns:
        `(tokens, out)` in `dtype`.
    """
    x = as_dtype(x, dtype)
    if terms.shift is not None and _can_fuse(W0, terms, terms.shift, dtype):
        output_scale = None if terms.outputs is None else 1 + terms.outputs
        left, right = terms.shift
        if left.dtype != dtype:
            left, right = left.to(dtype), right.to(dtype)
        return fused(x, W0, bias, output_scale, left, right)
    entries = terms.as_entries()
    y = scaled_product(x, W0, bias, terms, dtype) if entries is None else _expanded(x, W0, bias, entries)
    if terms.shift is not None:
        y, (left, right) = wide(y), terms.shift
        # In float16 the thin product may overflow where W' does not.
        thin = multiply(x, right.T) if dtype == torch.float16 else wide(F.linear(x, as_dtype(right, dtype)))
        y = y + multiply(thin, left.T) if is_traced() else y.addmm_(thin, as_dtype(left, y.dtype).T)
    return as_dtype(y, dtype)


def scaled_product(x: Tensor, W0: Tensor, bias: Tensor | None, terms: Terms, dtype: torch.dtype) -> Tensor:
    """`x (W0 * (1 + outputs + inputs))^T + bias`, not yet rounded to `dtype`.

    The bias and the two vectors may differ for each of a batch of x: `(batch, 1, out)`, `(batch, 1, in)`.
    """
    outputs, inputs = terms.outputs, terms.inputs
    change: Tensor | None = None
    product, half = row_blocks.linear, is_half(dtype)
    if half and (outputs is not None or not is_quantised(W0)):
        product = row_blocks.wide_product
    if inputs is not None and outputs is None and not half:
        x = x * (1 + inputs)
    elif inputs is not None and dtype == torch.float16:  # x * inputs may overflow where W0 * inputs does not
        largest = inputs.detach().abs().amax().clamp(min=1)
        change = product(as_dtype(x * (inputs / largest), dtype), W0) * largest
    elif inputs is not None:  # in half precision a small change of x would be rounded away
        change = product(as_dtype(x * inputs, dtype), W0)
    if outputs is not None:
        y = product(x, W0) * (1 + outputs)
    elif bias is None or bias.ndim > 1 or half:
        y = product(x, W0)
    else:
        y, bias = row_blocks.linear(x, W0, bias), None
    # Term by term in float32 at least, and rounded once (Note [Late terms]).
    for term in (_rounded(bias, dtype) if half and bias is not None else bias, change):
        if term is not None:
            y = y + wide(term) if is_traced() or y.dtype != working_dtype(y, term) else y.add_(term)
    return y


def _rounded(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias rounded to `dtype`, as autocast does; its gradient is not."""
    return bias if bias.dtype == dtype else bias + (bias.to(dtype) - bias).detach()


def _expanded(x: Tensor, W0: Tensor, bias: Tensor | None, entries: Pair) -> Tensor:
    """`x (W0 + W0 * (L R))^T + bias`, from x and a copy of it rescaled by each row of R."""
    left, right = entries
    copies = torch.cat([x.unsqueeze(1), x.unsqueeze(1) * as_dtype(right, x.dtype)], 1)
    product = row_blocks.wide_product if is_half(x.dtype) and not is_quantised(W0) else row_blocks.linear
    y = wide(product(copies, W0))  # (tokens, 1 + r, out)
    y = y[:, 0] + (y[:, 1:] * left.T).sum(1)
    return y if bias is None else y.add_(_rounded(bias, x.dtype))


# Note [One Function]
# As a chain of operations the shift costs autograd a step for each, and a pass over activations for each sum: the
# gradient of x is the sum of two results. In one Function the second product adds to the first one in place, forward
# and backward. Saved are x, the thin product x R^T, and x W0^T where the output scale asks for a gradient; under
# autocast W0 itself and no narrow copy of it. In bfloat16 the shift is part of the product with W0, or without a bias
# comes first: x W0^T is added to it in float32 (Note [Late terms]); with an output scale that product is wide, and kept
# in bfloat16 as the gradient of the outputs is. The factors' gradients are then bfloat16's own.
#
# x W0^T is kept although it is `(y - bias - shift) / output_scale`. To keep y instead is free only where the next
# module keeps y too (of 108 MiB in BERT 24 would stay). A module that writes over y in place would raise in its own
# backward pass. A GPU would have to be waited for to tell where a scale near 0 or a large bias loses too much. To
# compute it anew, or the scale's gradient as the row sums of `(g^T x) * W0`, is a third product.


def _can_fuse(W0: Tensor, terms: Terms, shift: Pair, dtype: torch.dtype) -> bool:
    """Whether these terms may be one Function (Note [One Function]).

    In bfloat16 its results differ from the chain's by roundings, so that those of a frozen shift do with and without
    gradients.
    """
    if terms.inputs is not None or terms.entries is not None:
        return False
    if torch.is_grad_enabled() and not shift[1].requires_grad:
        return False  # it would save x, which no gradient needs
    if dtype == torch.float16:
        return False  # Note [Late terms]
    return not (is_quantised(W0) or torch.compiler.is_compiling() or in_transform() or is_tracing())


def fused(
    x: Tensor, W0: Tensor, bias: Tensor | None, output_scale: Tensor | None, left: Tensor, right: Tensor
) -> Tensor:
    """`output_scale * (x W0^T) + bias + (x right^T) left^T`, all of one dtype but W0, bias and the scale.

    Args:
        x: `(tokens, in)`.
        W0: `(out, in)`, which asks for no gradient; under autocast it is wider, as is the bias.
        bias: `(out,)` or None.
        output_scale: `(out,)`, of its `working_dtype`; None for 1.
        left: `(out, r)`.
        right: `(r, in)`.

    Returns:
        `(tokens, out)`.
    """
    if not torch.is_grad_enabled():
        return _compute(x, W0, bias, output_scale, left, right)[0]
    apply: Any = _Fused.apply  # pyright: ignore - torch leaves it untyped
    return cast("Tensor", apply(x, W0, bias, output_scale, left, right))


def _compute(
    x: Tensor, W0: Tensor, bias: Tensor | None, output_scale: Tensor | None, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs, `x W0^T` (with the bias where nothing scales it), and `x right^T`."""
    thin = F.linear(x, right)
    if x.dtype == torch.bfloat16:
        return *_compute_narrow(x, W0, bias, output_scale, left, thin), thin
    product = y = F.linear(x, as_dtype(W0, x.dtype), None if output_scale is not None else bias)
    if output_scale is not None:
        y = y * output_scale if bias is None else torch.addcmul(bias, y, output_scale)
    return y.addmm_(thin, left.T), product, thin


def _compute_narrow(
    x: Tensor, W0: Tensor, bias: Tensor | None, output_scale: Tensor | None, left: Tensor, thin: Tensor
) -> tuple[Tensor, Tensor]:
    """The first two of `_compute` in bfloat16 (Note [Late terms])."""
    bias = None if bias is None else as_dtype(bias, x.dtype)
    few = bias is not None and len(x) <= row_blocks.FEW
    if output_scale is not None or few or not has_half_units(x, x.dtype):
        product = y = row_blocks.widened(x, W0)
        if output_scale is not None:
            y = y * output_scale if bias is None else torch.addcmul(wide(bias), y, output_scale)
        elif bias is not None:
            y.add_(bias)
        return y.addmm_(wide(thin), wide(left).T).to(x.dtype), product
    if bias is None:
        y = F.linear(thin, left).addmm_(x, as_dtype(W0, x.dtype).T)
    else:
        y = F.linear(torch.cat([x, thin], 1), row_blocks.side_by_side(W0, left, x.dtype), bias)
    return y, y


def _chain(
    x: Tensor, W0: Tensor | None, bias: Tensor | None, output_scale: Tensor | None, left: Tensor, right: Tensor
) -> Tensor:
    """`fused` in plain operations, without the product that no gradient depends on where W0 is None."""
    y = F.linear(F.linear(x, right), left)
    if W0 is not None:
        product = F.linear(x, as_dtype(W0, x.dtype))
        y = y + (product if output_scale is None else product * output_scale)
    return (y if bias is None else y + bias).to(x.dtype)


class _Fused(torch.autograd.Function):
    # Note [No setup_context].
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W0: Tensor, bias: Tensor | None, output_scale: Tensor | None, left: Tensor, right: Tensor
    ) -> Tensor:
        y, product, thin = _compute(x, W0, bias, output_scale, left, right)
        dx, _, _, dscale, dleft, _ = ctx.needs_input_grad
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(
            x,
            W0 if dx or dscale else None,
            output_scale,
            as_dtype(product, x.dtype) if dscale else None,
            thin if dleft else None,
            left,
            right,
        )
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,), wanted = grads, ctx.needs_input_grad
        x, W0, output_scale, product, thin, left, right = ctx.saved_tensors
        if is_differentiated(g):
            bias = placeholder([len(left)], ctx.bias_dtype, g) if wanted[2] else None
            return gradients(_chain, g, (x, W0, bias, output_scale, left, right), wanted)
        dx = dbias = dscale = dleft = dright = buffer = None
        full = g if g.dtype != torch.bfloat16 or has_half_units(g, g.dtype) else wide(g)  # Note [Late terms]
        with outside_autocast(g):
            thin_g = full @ as_dtype(left, full.dtype)
            if wanted[3]:
                buffer = g * product
                dscale = buffer.sum(0, dtype=output_scale.dtype)
            narrow = g.dtype == torch.bfloat16 and not g.is_cuda
            if wanted[0] and narrow and (output_scale is not None or full is not g):
                dx = row_blocks.multiply(full if output_scale is None else g * output_scale, W0, transposed=True)
                dx = dx.addmm_(wide(thin_g), wide(right)).to(g.dtype)
            elif wanted[0]:
                scaled_g = g if output_scale is None else torch.mul(g, output_scale, out=buffer)
                dx = (as_dtype(scaled_g, g.dtype) @ as_dtype(W0, g.dtype)).addmm_(thin_g, right)
            if wanted[2]:
                dbias = g.sum(0, dtype=ctx.bias_dtype)
            if wanted[4]:
                dleft = (thin.T @ g).T  # r rows of `out` are quicker than `out` rows of r
            if wanted[5]:
                dright = as_dtype(thin_g, x.dtype).T @ x
        return dx, None, dbias, dscale, dleft, dright
