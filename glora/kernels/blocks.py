r"""W' and dW' a block of rows at a time: both passes of `glora.kernels.blockwise`, on plain tensors without autograd.

`tensors` are left (or a vector or constant), right (or None) and scale of each path, the `count` paths A first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glora import functional
from glora.kernels.factored import join_factors
from glora.kernels.frozen import row_blocks
from glora.quantised import rows

# Note [Blocks]
# The gradient of a factor of an elementwise A needs dW' = g^T x entry by entry, so that A cannot be taken apart into
# thin products of activations as B can. But neither W' nor dW' need be whole: a block of rows of either depends on that
# block of rows of W0 alone. Made anew in the backward pass, a block of W' costs r/N of a product, and saves its memory.
# What is saved are the raw factors, which are parameters, and not their scaled and joined copies, which are not.
#
# In half precision (and under half autocast) rounding W' would lose small updates: the update goes through a product of
# its own, beside x W0^T, and is added in float32. That is the fourth product of a step; the backward pass uses W'.
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
    with torch.autocast(x.device.type, enabled=False):
        tokens = x.to(dtype)
        A, B = fold(W0, count, tensors)
        y = tokens.new_empty(tokens.shape[0], W0.shape[0])
        for block in row_blocks(W0):
            W = rows(W0, block)
            if dtype in (torch.bfloat16, torch.float16):
                beside = (tokens @ W.to(dtype).T).float() + tokens @ _update(W, A, B, block, one=False).to(dtype).T
                y[:, block] = beside if bias is None else beside + bias[block]
            elif bias is None:
                torch.mm(tokens, _weight(W, A, B, block).to(dtype).T, out=y[:, block])
            else:
                torch.addmm(bias[block].to(dtype), tokens, _weight(W, A, B, block).to(dtype).T, out=y[:, block])
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
    with torch.autocast(W0.device.type, enabled=False):
        g = g.to(dtype)
        tokens = None if x is None else x.to(dtype)
        A, B = fold(W0, count, tensors)
        dA, dB = ([torch.zeros_like(factor) for factor in pair] for pair in (A, B))
        # In half precision the blocks' shares are added up in float32, however many there are.
        wide = functional.working_dtype(g)
        dx = None if dx_dtype is None else g.new_empty(g.shape[0], W0.shape[1], dtype=wide)
        for block in row_blocks(W0):
            W = rows(W0, block)
            if dx is not None:
                _add_product(dx, g[:, block], _weight(W, A, B, block).to(dtype), first=block.start == 0)
            if tokens is not None:
                dW = (g[:, block].T @ tokens).to(A[0].dtype)
                if B[0].shape[1]:
                    dB[0][block] = dW @ B[1].T
                    dB[1].addmm_(B[0][block].T, dW)
                dW = dW.mul_(W)
                dA[0][block] = dW @ A[1].T
                dA[1].addmm_(A[0][block].T, dW)
        dbias = None if dbias_dtype is None else g.sum(0, dtype=dbias_dtype)
        dfactors: list[Tensor | None] = [None] * len(tensors)
        if tokens is not None:
            dfactors = _unfold(count, tensors, dA, dB)
    return None if dx is None else dx.to(dx_dtype), dbias, dfactors


def _update(W: Tensor, A: list[Tensor], B: list[Tensor], block: slice, *, one: bool) -> Tensor:
    """`W * A + B` of a block, or with `one` W' itself, `W * (1 + A) + B`, unrounded: three passes over one buffer.

    A's last component is the one, so that `1 + A` is a single product.
    """
    rank = A[0].shape[1] - (not one)
    update = (A[0][block, :rank] @ A[1][:rank]).mul_(W)
    return update.addmm_(B[0][block], B[1]) if B[0].shape[1] else update


def _weight(W: Tensor, A: list[Tensor], B: list[Tensor], block: slice) -> Tensor:
    """A block of W', in W0's dtype, rounded once."""
    return _update(W, A, B, block, one=True).to(W.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Add `left @ right` to a total that may be wider; the first one overwrites memory that is not initialised."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=0 if first else 1)
    elif first:
        total.copy_(left @ right)
    else:
        total.add_(left @ right)


def fold(W0: Tensor, count: int, tensors: Sequence[Any]) -> list[list[Tensor]]:
    """All paths A as one pair, and all paths B: low-rank factors side by side, a vector as a component of rank one.

    The last component of A is 1, which keeps W0 itself.
    """
    out_features, in_features = W0.shape
    wide = functional.working_dtype(W0, *tensors[::3])
    device = W0.device
    column = torch.ones(out_features, 1, dtype=wide, device=device)
    row = torch.ones(1, in_features, dtype=wide, device=device)
    sides: list[list[list[Tensor]]] = [[[], []], [[], []]]
    for number in range(len(tensors) // 3):
        left, right, scale = tensors[3 * number : 3 * number + 3]
        lefts, rights = sides[number >= count]
        columns = left.to(wide) * scale
        lefts.append(columns if right is not None else columns.reshape(-1, 1).expand(out_features, 1))
        rights.append(right.to(wide) if right is not None else row)
    sides[0][0].append(column)
    sides[0][1].append(row)
    return [[_join(lefts, column, 1), _join(rights, row, 0)] for lefts, rights in sides]


def _join(factors: list[Tensor], like: Tensor, dim: int) -> Tensor:
    return join_factors(factors, dim) if factors else like.narrow(dim, 0, 0)


def _unfold(count: int, tensors: Sequence[Any], dA: list[Tensor], dB: list[Tensor]) -> list[Tensor | None]:
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
