"""Products of low-rank matrices as one pair `left @ right`, of the rank of W0 at most."""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def within(left: Tensor, right: Tensor) -> Pair:
    """The same product of the rank that a matrix of its size can have: with more components, itself and an identity."""
    rows, rank, columns = left.shape[0], left.shape[1], right.shape[1]
    if rank <= min(rows, columns):
        return left, right
    product = left @ right
    if rows <= columns:
        return torch.eye(rows, dtype=product.dtype), product
    return product, torch.eye(columns, dtype=product.dtype)


def elementwise(one: Pair, other: Pair) -> Pair:
    """`(a @ b) * (c @ d)`, elementwise: the rank is the product of both.

    Example:
        >>> a, b, c, d = torch.rand(3, 1), torch.rand(1, 4), torch.rand(3, 2), torch.rand(2, 4)
        >>> left, right = elementwise((a, b), (c, d))
        >>> bool(torch.allclose(left @ right, (a @ b) * (c @ d))), left.shape[1]
        (True, 2)
    """
    (a, b), (c, d) = one, other
    if a.shape[1] * c.shape[1] > min(a.shape[0], b.shape[1]):  # the products are smaller than all their components
        product = (a @ b) * (c @ d)
        return within(product, torch.eye(product.shape[1], dtype=product.dtype))
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
    """A matrix as a pair, of as many components as its smaller side."""
    return within(matrix, torch.eye(matrix.shape[1], dtype=matrix.dtype))
