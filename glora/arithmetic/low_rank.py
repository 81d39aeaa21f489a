"""The nearest product of low rank, and how far away it is."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

linalg = cast("Any", torch.linalg)  # whose functions are untyped

# Not every other device has float64 (Apple's has not), and the sums of squares here need it.
_WITH_DOUBLES = ("cpu", "cuda")


def double(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where its device has none."""
    tensor = tensor.detach()
    return (tensor if tensor.device.type in _WITH_DOUBLES else tensor.cpu()).double()


def nearest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The pair `(..., rows, rank)`, `(..., rank, columns)` whose product comes closest to a matrix (Eckart and Young).

    Both have an equal share of each singular value. Where the matrix is smaller than the rank, the rest is zeros.

    Example:
        >>> left, right = nearest(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), rank=1)
        >>> left @ right
        tensor([[3., 0.],
                [0., 0.]])
    """
    U, sizes, Vh = cast("tuple[Tensor, ...]", linalg.svd(matrix, full_matrices=False))
    roots = sizes[..., :rank].sqrt()
    return widened(U[..., :rank] * roots[..., None, :], roots[..., :, None] * Vh[..., :rank, :], rank)


def truncated(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The pair of at most this rank that comes closest to `left @ right`, and its relative error (Frobenius norm).

    The product is never formed: two thin QR decompositions leave a matrix as small as the pair's rank. A pair of this
    rank or less is returned as it is.
    """
    if left.shape[-1] <= rank:
        return left, right, 0.0
    Q, R = cast("tuple[Tensor, Tensor]", linalg.qr(double(left)))
    P, S = cast("tuple[Tensor, Tensor]", linalg.qr(double(right).mT))
    core = R @ S.mT
    small_left, small_right = nearest(core, rank)
    return (Q @ small_left).to(left), (small_right @ P.mT).to(right), share(core - small_left @ small_right, core)


def norm(tensor: Tensor) -> float:
    """The root of the sum of squares."""
    return tensor.square().sum().sqrt().item()


def share(part: Tensor, whole: Tensor) -> float:
    """The norm of a part in that of the whole; 0 of nothing."""
    return norm(part) / (norm(whole) or 1.0)


def widened(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product with components of zeros, up to this rank."""
    missing = rank - left.shape[-1]
    if missing <= 0:
        return left, right
    columns, rows = (
        left.new_zeros(*left.shape[:-1], missing),
        right.new_zeros(*right.shape[:-2], missing, right.shape[-1]),
    )
    return torch.cat([left, columns], -1), torch.cat([right, rows], -2)
