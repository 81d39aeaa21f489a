"""`glora.kernels.blocks` as operators of torch's, which torch.compile calls and does not look into.

Example:
    >>> import torch, glora
    >>> layer = glora.apply(torch.nn.Linear(4, 2))
    >>> compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    >>> x = torch.randn(3, 4)
    >>> torch.allclose(compiled(x), layer(x), atol=1e-6)
    True
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from glora.kernels import blocks

# Note [Opaque]
# torch.compile would unroll the loop over blocks, make a kernel of every step, and keep the forward pass's W' for the
# backward pass, since it finds the same W' computed there again. An operator of its own it takes as it is: it compiles
# nothing, and what is saved are the operator's inputs. What is lost is that the passes over a block are not joined into
# fewer. The gradient has no formula of its own, so that a second derivative raises; torch.func's transforms, which
# would need rules, take another kernel (Note [Kernels]). A quantised W0 is a tensor of a subclass, which takes no
# operator that it does not know: there the loop is compiled, and only where something asks for a gradient.


def linear(
    x: Tensor, W0: Tensor, bias: Tensor | None, dtype: torch.dtype, count: int, tensors: Sequence[Tensor | None]
) -> Tensor:
    """`blocks.forward`, with its gradient, for a graph that is being compiled."""
    lefts, rights, scales = tensors[::3], tensors[1::3], tensors[2::3]
    pairs = [right is not None for right in rights]  # no operator takes a list with a None in it
    factors = [factor for path in zip(lefts, rights, strict=True) for factor in path if factor is not None]
    return cast("Tensor", torch.ops.glora.linear(x, W0, bias, dtype, count, pairs, factors, scales))


def _join(pairs: list[bool], factors: list[Tensor], scales: list[Tensor]) -> list[Tensor | None]:
    """The tensors as `blocks` takes them."""
    rest, joined = iter(factors), list[Tensor | None]()
    for pair, scale in zip(pairs, scales, strict=True):
        joined += [next(rest), next(rest) if pair else None, scale]
    return joined


def _compute(
    x: Tensor,
    W0: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    count: int,
    pairs: list[bool],
    factors: list[Tensor],
    scales: list[Tensor],
) -> Tensor:
    return blocks.forward(x, W0, bias, dtype, count, _join(pairs, factors, scales))


def _like_forward(x: Tensor, W0: Tensor, bias: Tensor | None, dtype: torch.dtype, *_: object) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], W0.shape[0], dtype=dtype)


def _setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:  # noqa: ARG001 - torch's signature
    x, W0, bias, ctx.dtype, ctx.count, ctx.pairs, factors, scales = inputs
    ctx.number = len(factors)
    ctx.dx_dtype = x.dtype if ctx.needs_input_grad[0] else None
    ctx.dbias_dtype = bias.dtype if ctx.needs_input_grad[2] else None
    # Frozen factors need no x, as in `blockwise`. Here there is one flag for each tensor of a list.
    ctx.save_for_backward(x if any(ctx.needs_input_grad[6:]) else None, W0, *factors, *scales)


def _backward(ctx: Any, g: Tensor) -> Any:
    x, W0, *rest = ctx.saved_tensors
    factors, scales = rest[: ctx.number], rest[ctx.number :]
    asked = ctx.dx_dtype, ctx.dbias_dtype
    found = iter(torch.ops.glora.linear_backward(g, x, W0, ctx.dtype, ctx.count, ctx.pairs, factors, scales, *asked))
    dx, dbias = (None if dtype is None else next(found) for dtype in asked)
    dfactors = [None] * len(factors) if x is None else list(found)
    return dx, None, dbias, None, None, None, dfactors, [None] * len(scales)


def _compute_backward(
    g: Tensor,
    x: Tensor | None,
    W0: Tensor,
    dtype: torch.dtype,
    count: int,
    pairs: list[bool],
    factors: list[Tensor],
    scales: list[Tensor],
    dx_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> list[Tensor]:
    tensors = _join(pairs, factors, scales)
    dx, dbias, dfactors = blocks.backward(g, x, W0, dtype, count, tensors, dx_dtype, dbias_dtype)
    found = [grad for grad in (dx, dbias, *dfactors) if grad is not None]
    # An operator's results may share no memory.
    return [grad if grad.nbytes == grad.untyped_storage().nbytes() else grad.clone() for grad in found]


def _like_backward(
    g: Tensor,
    x: Tensor | None,
    W0: Tensor,
    dtype: torch.dtype,  # noqa: ARG001
    count: int,  # noqa: ARG001
    pairs: list[bool],  # noqa: ARG001
    factors: list[Tensor],
    scales: list[Tensor],  # noqa: ARG001
    dx_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> list[Tensor]:
    dx = [] if dx_dtype is None else [g.new_empty(g.shape[0], W0.shape[1], dtype=dx_dtype)]
    dbias = [] if dbias_dtype is None else [g.new_empty(g.shape[1], dtype=dbias_dtype)]
    return [*dx, *dbias, *([] if x is None else [factor.new_empty(factor.shape) for factor in factors])]


# Schemas by hand: torch reads none from annotations that are strings.
_PATHS = "ScalarType dtype, int count, bool[] pairs, Tensor[] factors, Tensor[] scales"
_operator: Any = torch.library.custom_op
_forward = _operator(
    "glora::linear",
    _compute,
    mutates_args=(),
    schema=f"(Tensor x, Tensor W0, Tensor? bias, {_PATHS}) -> Tensor",
)
_forward.register_fake(_like_forward)
_forward.register_autograd(_backward, setup_context=_setup_context)
_operator(
    "glora::linear_backward",
    _compute_backward,
    mutates_args=(),
    schema=f"(Tensor g, Tensor? x, Tensor W0, {_PATHS}, ScalarType? dx_dtype, ScalarType? dbias_dtype) -> Tensor[]",
).register_fake(_like_backward)
