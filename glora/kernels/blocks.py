r"""W' and dW' a block of rows at a time: both passes of `glora.kernels.blockwise`, on plain tensors without autograd.

`tensors` are left (or a vector or constant), right (or None) and scale of each path, the `count` paths A first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glora.functional import Factors
from glora.kernels.factored import pair_of
from glora.kernels.frozen import row_blocks
from glora.precision import outside_autocast, wide, working_dtype
from glora.tensors import rows

# Note [Blocks]
# The gradient of a factor of an elementwise A needs dW' = g^T x entry by entry, so that A cannot be taken apart into
# thin products of activations as B can. But neither W' nor dW' need be whole: a block of rows of either depends on that
# block of rows of W0 alone. Made anew in the backward pass, a block of W' costs r/N of a product, and saves its memory.
# What is saved are the raw factors, which are parameters, and not their scaled and joined copies, which are not.
#
# In half precision (and under half autocast) rounding W' would lose small updates: the update goes through a product of
# its own, which adds to x W0^T (`addmm_` sums in float32, and rounds the sum). The bias comes last: beside a large one
# x W0^T would be rounded coarsely. That is the fourth product of a step; the backward pass uses W'.
#
# `frozen.row_blocks` gives them. At 2048 x 2048, 1024 tokens, float32, on two cores, a step was timed with blocks of
# 2^19, 2^20, 2^21 entries: 1.19, 1.12, 1.09 of a trained nn.Linear's. In small blocks the product for dW' suffers (it
# packs all of x for each of them); above there is little to gain, and memory to lose.


def forward(
    x: Tensor, W0: Tensor, bias: Tensor | None, dtype: torch.dtype, count: int, tensors: Sequence[Tensor | None]
) -> Tensor:
    """`x W'^T + bias`.

    Args:
        x: `(tokens, in)`.
        W0: `(out, in)`.
        bias: `(out,)` or None.
        dtype: that of the products and of the result.
        count: how many of the paths are A.
        tensors: three for each path.

    Returns:
        `(tokens, out)` in `dtype`.
    """
    with outside_autocast(x):
        tokens = x.to(dtype)
        A, B = fold(W0, count, tensors)
        y = tokens.new_empty(tokens.shape[0], W0.shape[0])
        half = dtype in (torch.bfloat16, torch.float16)
        for block in row_blocks(W0):
            W, part = rows(W0, block), y[:, block]
            if half:
                torch.mm(tokens, W.to(dtype).T, out=part).addmm_(tokens, _update(W, A, B, block).to(dtype).T)
                if bias is not None:
                    part.add_(bias[block])
            elif bias is None:
                torch.mm(tokens, _weight(W, A, B, block).to(dtype).T, out=part)
            else:
                torch.addmm(bias[block].to(dtype), tokens, _weight(W, A, B, block).to(dtype).T, out=part)
        return y


def backward(
    g: Tensor,
    x: Tensor | None,
    W0: Tensor,
    dtype: torch.dtype,
    count: int,
    tensors: Sequence[Tensor | None],
    dx_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """The gradients of `forward`.

    Args:
        g: of its result, `(tokens, out)`.
        x: its input; None where no factor asks for a gradient.
        W0: its weight.
        dtype: that of its products.
        count: how many of the paths are A.
        tensors: three for each path.
        dx_dtype: x's dtype; None where x asks for no gradient.
        dbias_dtype: the bias's; None where it asks for none.

    Returns:
        The gradients of x, of the bias, and of each of the tensors; None where none is asked for, and for the scales.
    """
    with outside_autocast(W0):
        g = g.to(dtype)
        tokens = None if x is None else x.to(dtype)
        A, B = fold(W0, count, tensors)
        dA, dB = ([torch.empty_like(pair[0]), None] if pair else [] for pair in (A, B))
        dx = None
        for block in row_blocks(W0):
            W = rows(W0, block)
            if dx_dtype is not None:
                dx = _add_product(dx, g[:, block], _weight(W, A, B, block).to(dtype))
            if tokens is not None:
                dW = (g[:, block].T @ tokens).to(A[0].dtype)
                if B:
                    _differentiate(B, dB, dW, block)
                _differentiate(A, dA, dW.mul_(W), block)
        dbias = None if dbias_dtype is None else g.sum(0, dtype=dbias_dtype)
        dfactors: list[Tensor | None] = [None] * len(tensors)
        if tokens is not None:
            dfactors = _unfold(count, tensors, dA, dB)
    return None if dx is None else dx.to(dx_dtype), dbias, dfactors


def _update(W: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], block: slice, *, on_top: bool = False) -> Tensor:
    """`W * A + B` of a block, or with `on_top` `W + W * A + B`, unrounded: three passes over one buffer."""
    update = A[0][block] @ A[1]
    update = torch.addcmul(W, W, update, out=update) if on_top else update.mul_(W)
    return update.addmm_(B[0][block], B[1]) if B else update


def _weight(W: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], block: slice) -> Tensor:
    """A block of W', in W0's dtype, rounded once."""
    return _update(W, A, B, block, on_top=True).to(W.dtype)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`total + left @ right`, over `total` where it can be: in half precision, several are added up in float32."""
    if total is None:
        return left @ right
    total = wide(total)
    return total.addmm_(left, right) if total.dtype == left.dtype else total.add_(left @ right)


def _differentiate(pair: Sequence[Tensor], grads: list[Any], dW: Tensor, block: slice) -> None:
    """The gradients of `left @ right` from that of a block of its rows: whole for left's, a share for right's."""
    torch.mm(dW, pair[1].T, out=grads[0][block])
    grads[1] = _add_product(grads[1], pair[0][block].T, dW)


def fold(W0: Tensor, count: int, tensors: Sequence[Any]) -> list[list[Tensor]]:
    """All paths A as one pair, and all paths B; an empty list where there is none.

    Low-rank factors stand side by side, with a vector as a component of rank one.
    """
    dtype = working_dtype(W0, *tensors[::3])
    triples = zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True)
    paths = [Factors(left if right is None else (left, right), scale) for left, right, scale in triples]
    sides = paths[:count], paths[count:]
    return [[factor.to(dtype) for factor in pair_of(side, *W0.shape)] if side else [] for side in sides]


def _unfold(count: int, tensors: Sequence[Any], dA: list[Any], dB: list[Any]) -> list[Tensor | None]:
    """The gradients of the tensors from those of the two pairs; None for the scales."""
    grads: list[Tensor | None] = []
    at = 0
    for number in range(len(tensors) // 3):
        left, right, scale = tensors[3 * number : 3 * number + 3]
        dleft, dright = dA if number < count else dB
        at = 0 if number == count else at
        rank = 1 if right is None else left.shape[1]
        scaled = dleft[:, at : at + rank] * scale
        if right is None:  # a constant stands in every row
            scaled = (scaled if left.numel() > 1 else scaled.sum(0)).reshape(left.shape)
        grads += [scaled.to(left.dtype), None if right is None else dright[at : at + rank].to(right.dtype), None]
        at += rank
    return grads
