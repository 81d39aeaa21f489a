"""Products of low-rank matrices as one pair `left @ right`, of the rank of W0 at most."""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def within(left: Tensor, right: Tensor) -> Pair:
    """The same product of the rank that a matrix of its size can have: with more components, itself and an identity.

    Raises:
        ValueError: the two have no product.
    """
    rank = _rank(left, right)
    return (left, right) if rank <= min(left.shape[0], right.shape[1]) else whole(left @ right)


def _rank(left: Tensor, right: Tensor) -> int:
    """The components of a pair, which must be as many on both sides: before anything is made of them."""
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"factors of {tuple(left.shape)} and {tuple(right.shape)} have no product")
    return left.shape[1]


def elementwise(one: Pair, other: Pair) -> Pair:
    """`(a @ b) * (c @ d)`, elementwise: the rank is the product of both.

    Example:
        >>> a, b, c, d = torch.rand(3, 1), torch.rand(1, 4), torch.rand(3, 2), torch.rand(2, 4)
        >>> left, right = elementwise((a, b), (c, d))
        >>> bool(torch.allclose(left @ right, (a @ b) * (c @ d))), left.shape[1]
        (True, 2)
    """
    (a, b), (c, d) = one, other
    if (a.shape[0], b.shape[1]) != (c.shape[0], d.shape[1]):
        raise ValueError(f"{(a.shape[0], b.shape[1])} and {(c.shape[0], d.shape[1])} have no elementwise product")
    if _rank(a, b) * _rank(c, d) > min(a.shape[0], b.shape[1]):  # the products are smaller than all their components
        return whole((a @ b) * (c @ d))
    left = (a.unsqueeze(2) * c.unsqueeze(1)).flatten(1)
    return left, (b.unsqueeze(1) * d.unsqueeze(0)).flatten(0, 1)


def kronecker(one: Pair, other: Pair) -> Pair:
    """The Kronecker product of `a @ b` and `c @ d`: the rank is the product of both."""
    (a, b), (c, d) = one, other
    return within(_kron(a, c), _kron(b, d))


def _kron(one: Tensor, other: Tensor) -> Tensor:
    """torch.kron, which takes no transposed matrix of a single row or column."""
    return (one[:, None, :, None] * other[None, :, None, :]).flatten(2).flatten(0, 1)


def whole(matrix: Tensor) -> Pair:
    """A matrix as a pair, of as many components as its smaller side: itself, and an identity of that side."""
    rows, columns = matrix.shape
    eye = torch.eye(min(rows, columns), dtype=matrix.dtype)
    return (eye, matrix) if rows < columns else (matrix, eye)
