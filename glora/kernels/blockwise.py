r"""A linear layer with a low-rank elementwise A, without W' ever being whole.

`W' = W0 + W0 * (L_A R_A) + L_B R_B` is made, used and forgotten a block of rows at a time, forward and backward, and
nothing is saved but the input and the factors: three matrix products a step, like a trained layer's (Note [Blocks]).

Example:
    >>> import torch, glora
    >>> layer = glora.apply(torch.nn.Linear(4, 2))
    >>> compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    >>> x = torch.randn(3, 4)
    >>> torch.allclose(compiled(x), layer(x), atol=1e-6)
    True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from glora import functional
from glora.kernels.double_backward import gradients, is_differentiated, placeholder
from glora.kernels.row_blocks import blocks_of, columns, is_better_wide, side_by_side
from glora.kernels.terms import Terms
from glora.precision import as_dtype, is_half, outside_autocast, wide
from glora.tensors import dense, is_all_rows, is_quantised, rows

# Note [Blocks]
# The gradient of a factor of an elementwise A needs dW' = g^T x entry by entry, so that A cannot be taken apart into
# thin products of activations as B can. But neither W' nor dW' need be whole: a block of rows of either depends on that
# block of rows of W0 alone. Made anew in the backward pass, a block of W' costs r/N of a product, and saves its memory.
#
# In half precision (and under half autocast) rounding W' would lose small updates: W0 and the update stand beside each
# other in one product of twice the size, `[x, x] [W0, dW]^T + bias` (Note [Late terms]). That is the fourth product of
# a step; the backward pass uses W'. For few tokens, and where a processor has no units for half precision, W' and the
# products are float32, forward and backward: three again.
#
# The size of a block: at 2048 x 2048, 1024 tokens, float32, on two cores, a step was timed with blocks of 2^19, 2^20,
# 2^21 entries: 1.19, 1.12, 1.09 of a trained nn.Linear's. In small blocks the product for dW' suffers (it packs all of
# x for each of them); above there is little to gain, and memory to lose.

# Note [Opaque]
# torch.compile would unroll the loop over blocks, make a kernel of every step, and keep the forward pass's W' for the
# backward pass, since it finds the same W' computed there again. An operator of its own it takes as it is: it compiles
# nothing, and what is saved are the operator's inputs. The price: the compiler cannot fuse the passes over a block. The
# gradient has no formula of its own, so that a second derivative raises; torch.func's transforms, which would need
# rules, take another kernel (Note [Kernels]). A quantised W0 is a tensor of a subclass, which takes no operator that it
# does not know: there the loop is compiled, and only where something asks for a gradient.

# Left and right of the entries, and of the shift or None.
Factors = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def linear(x: Tensor, W0: Tensor, bias: Tensor | None, terms: Terms, dtype: torch.dtype) -> Tensor:
    """`x W'^T + bias` in blocks of rows of W0, which must not ask for a gradient.

    Args:
        x: `(tokens, in)`.
        W0: `(out, in)`.
        bias: `(out,)` or None.
        terms: of the adapters; they scale entries.
        dtype: of the products and of the result: x's, or autocast's.

    Returns:
        `(tokens, out)` in `dtype`.
    """
    run: Any = forward
    if torch.compiler.is_compiling() and not is_quantised(W0):
        run = torch.ops.glora.linear
    elif torch.is_grad_enabled():
        run = _Blockwise.apply  # pyright: ignore - torch leaves it untyped
    return cast("Tensor", run(x, W0, bias, dtype, *(terms.as_entries() or ()), *(terms.shift or (None, None))))


# The two passes, on plain tensors and without autograd.


def forward(x: Tensor, W0: Tensor, bias: Tensor | None, dtype: torch.dtype, *factors: Any) -> Tensor:
    """`x W'^T + bias` in `dtype`; the factors are left and right of the entries and of the shift."""
    half = is_half(dtype)
    is_wide = half and is_better_wide(x, dtype)
    beside = half and not is_wide  # W0 and the update
    with outside_autocast(x):
        x = as_dtype(x, dtype)
        x = wide(x) if is_wide else torch.cat([x, x], 1) if beside else x
        y = x.new_empty(x.shape[0], W0.shape[0])
        for block in blocks_of(W0):
            W, own, part = rows(W0, block), _rows(factors, block), columns(y, block)
            weight = side_by_side(W, _update(W, own), dtype) if beside else _weight(W, own, dtype, is_wide)
            if bias is None:
                torch.mm(x, weight.T, out=part)
            else:
                torch.addmm(as_dtype(as_dtype(bias[block], dtype), x.dtype), x, weight.T, out=part)
        return as_dtype(y, dtype)


def backward(g: Tensor, x: Tensor | None, W0: Tensor, dtype: torch.dtype, *rest: Any) -> list[Tensor]:
    """The gradients of x and of the bias, each if its dtype is given, and of the factors, if x is given.

    Args:
        g: of the result, `(tokens, out)`.
        x: the input; None where no factor asks for a gradient.
        W0: the weight.
        dtype: of the products.
        rest: the factors as in `forward`; the dtypes of x and of the bias, None where it asks for no gradient.
    """
    *factors, dx_dtype, dbias_dtype = rest
    is_wide = is_half(dtype) and is_better_wide(g, dtype)
    with outside_autocast(W0):
        g, x, dx = as_dtype(g, dtype), None if x is None else as_dtype(x, dtype), None
        if is_wide:
            g, x = wide(g), None if x is None else wide(x)
        entries, shift = _PairGradient(), _PairGradient()
        for block in blocks_of(W0):
            W, own, part = rows(W0, block), _rows(factors, block), columns(g, block)
            if dx_dtype is not None:
                dx = _add_product(dx, part, _weight(W, own, dtype, is_wide))
            if x is not None:
                left, right, shift_left, shift_right = own
                dW = as_dtype(part.T @ x, left.dtype)
                if shift_left is not None:
                    shift.add(shift_left, cast("Tensor", shift_right), dW)
                entries.add(left, right, dW.mul_(W))
        grads = [] if dx is None else [as_dtype(dx, cast("torch.dtype", dx_dtype))]
        grads += [] if dbias_dtype is None else [g.sum(0, dtype=dbias_dtype)]
        return grads + entries.result() + shift.result()


def _rows(factors: Sequence[Any], block: slice) -> Factors:
    """The factors of a block of W'."""
    left, right, shift_left, shift_right = factors
    if not is_all_rows(left, block):
        left, shift_left = left[block], None if shift_left is None else shift_left[block]
    return left, right, shift_left, shift_right


def _update(W: Tensor, factors: Factors, *, on_top: bool = False) -> Tensor:
    """`W * A + B` of a block, or with `on_top` `W + W * A + B`, unrounded: three passes over one buffer."""
    left, right, shift_left, shift_right = factors
    update = left @ right
    update = torch.addcmul(W, W, update, out=update) if on_top else update.mul_(W)
    return update if shift_left is None else update.addmm_(shift_left, cast("Tensor", shift_right))


def _weight(W: Tensor, factors: Factors, dtype: torch.dtype, is_wide: bool) -> Tensor:
    """A block of W' for products in `dtype`, rounded to W0's dtype first; with `is_wide` W0 alone is rounded."""
    if is_wide:
        return _update(W, factors).add_(as_dtype(W, dtype))
    return as_dtype(as_dtype(_update(W, factors, on_top=True), W.dtype), dtype)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`total + left @ right`, over `total` where it can be: in half precision, several are added up in float32."""
    if total is None:
        return left @ right
    total = wide(total)
    return total.addmm_(left, right) if total.dtype == left.dtype else total.add_(left @ right)


class _PairGradient:
    """The gradients of a pair, from those of the blocks of its product: left's are whole, right's are shares."""

    def __init__(self) -> None:
        self.left: list[Tensor] = []
        self.right: Tensor | None = None

    def add(self, left: Tensor, right: Tensor, dW: Tensor) -> None:
        self.left.append(dW @ right.T)
        self.right = _add_product(self.right, left.T, dW)

    def result(self) -> list[Tensor]:
        if self.right is None:
            return []
        return [self.left[0] if len(self.left) == 1 else torch.cat(self.left), self.right]


# Autograd, eager and compiled: both save the same tensors, and return the same gradients.


def _save(ctx: Any, inputs: Any, output: object = None) -> None:  # noqa: ARG001 - torch's signature
    x, W0, bias, ctx.dtype, *factors = inputs
    ctx.shape, ctx.x_dtype, ctx.bias_dtype = x.shape, x.dtype, None if bias is None else bias.dtype
    # Frozen factors need no x: it is not saved, and may be written over.
    ctx.save_for_backward(x if any(ctx.needs_input_grad[4:]) else None, W0, *factors)


def _differentiate(ctx: Any, g: Tensor, run: Callable[..., list[Tensor]]) -> Any:
    """The gradients of all inputs by `run`, which is `backward` or its operator."""
    x, W0, *factors = ctx.saved_tensors
    wants_x, _, wants_bias = ctx.needs_input_grad[:3]
    dtypes = ctx.x_dtype if wants_x else None, ctx.bias_dtype if wants_bias else None
    grads = iter(run(g, x, W0, ctx.dtype, *factors, *dtypes))
    wanted = wants_x, False, wants_bias, False, *(factor is not None and x is not None for factor in factors)
    return tuple(next(grads) if want else None for want in wanted)


class _Blockwise(torch.autograd.Function):
    # Note [No setup_context].
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs)
        return forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        if torch.compiler.is_compiling() or not is_differentiated(g):
            return _differentiate(ctx, g, backward)
        x, W0, *factors = ctx.saved_tensors
        x = placeholder(ctx.shape, ctx.x_dtype, g) if x is None else x
        bias = placeholder([len(W0)], ctx.bias_dtype, g) if ctx.needs_input_grad[2] else None
        return gradients(_through_dense, g.to(ctx.dtype), (x, W0, bias, ctx.dtype, *factors), ctx.needs_input_grad)


def _through_dense(x: Tensor, W0: Tensor, bias: Tensor | None, dtype: torch.dtype, *factors: Any) -> Tensor:
    """`forward` by a whole W', in plain operations."""
    W, entries, shift = dense(W0), factors[:2], None if factors[2] is None else factors[2:]
    y = x.to(dtype) @ functional.add(W, [functional.weight_update(W, entries, shift)]).to(dtype).T
    return y if bias is None else (y + bias).to(dtype)


# Schemas by hand: torch reads none from annotations that are strings.
_ARGUMENTS = "ScalarType dtype, Tensor left, Tensor right, Tensor? shift_left, Tensor? shift_right"
_BACKWARD = f"Tensor g, Tensor? x, Tensor W0, {_ARGUMENTS}, ScalarType? dx_dtype, ScalarType? dbias_dtype"
_operator: Any = torch.library.custom_op


@_operator("glora::linear", mutates_args=(), schema=f"(Tensor x, Tensor W0, Tensor? bias, {_ARGUMENTS}) -> Tensor")
def _forward(*inputs: Any) -> Tensor:
    return forward(*inputs)


@_operator("glora::linear_backward", mutates_args=(), schema=f"({_BACKWARD}) -> Tensor[]")
def _backward(*inputs: Any) -> list[Tensor]:
    return backward(*inputs)


@_forward.register_fake
def _(x: Tensor, W0: Tensor, _bias: object, dtype: torch.dtype, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], W0.shape[0], dtype=dtype)


@_backward.register_fake
def _(g: Tensor, x: Tensor | None, W0: Tensor, _dtype: object, *rest: Any) -> list[Tensor]:
    *factors, dx_dtype, dbias_dtype = rest
    dx = [] if dx_dtype is None else [g.new_empty(g.shape[0], W0.shape[1], dtype=dx_dtype)]
    dbias = [] if dbias_dtype is None else [g.new_empty(g.shape[1], dtype=dbias_dtype)]
    factors = [] if x is None else [factor for factor in factors if factor is not None]
    return [*dx, *dbias, *(factor.new_empty(factor.shape) for factor in factors)]


def _backward_of_operator(ctx: Any, g: Tensor) -> Any:
    return _differentiate(ctx, g, torch.ops.glora.linear_backward)


_forward.register_autograd(_backward_of_operator, setup_context=_save)
