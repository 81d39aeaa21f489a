"""GLoRA once more, independent of the library: plain loops over Python floats."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Path = Tensor | tuple[Tensor, Tensor] | None


def entry(path: Path, row: int, column: int) -> float:
    """Entry (row, column) of the matrix that a path of two dimensions stands for."""
    if path is None:
        return 0.0
    if isinstance(path, tuple):
        left, right = path
        return sum(left[row, k].item() * right[k, column].item() for k in range(left.shape[1]))
    if path.ndim == 1:
        return path[0].item()
    return path[row if path.shape[0] > 1 else 0, column if path.shape[1] > 1 else 0].item()


def channel(path: Tensor | None, row: int) -> float:
    """Entry of the vector that a path of one dimension stands for."""
    return 0.0 if path is None else path[row if path.shape[0] > 1 else 0].item()


def weight(W0: Tensor, updates: Sequence[tuple[float, Path, Path, str]]) -> Tensor:
    """`W0 + sum_i w_i (W0 * A_i + B_i)` in float64, for updates (w, A, B, product)."""
    o, i = W0.shape
    result = W0.double().clone()
    for w, A, B, product in updates:
        for row in range(o):
            for column in range(i):
                if A is None:
                    scaled = 0.0
                elif product == "hadamard":
                    scaled = W0[row, column].item() * entry(A, row, column)
                elif isinstance(A, Tensor) and A.shape != (i, i):  # a diagonal matrix
                    scaled = W0[row, column].item() * entry(A, 0, column)
                else:
                    scaled = sum(W0[row, k].item() * entry(A, k, column) for k in range(i))
                result[row, column] += w * (scaled + entry(B, row, column))
    return result


def bias(W0: Tensor, b0: Tensor | None, updates: Sequence[tuple[float, Path, Tensor | None, Tensor | None]]) -> Tensor:
    """`b0 + sum_i w_i (b0 * D_i + E_i + W0 C_i)` in float64, for updates (w, C, D, E)."""
    o, i = W0.shape
    base = torch.zeros(o, dtype=torch.float64) if b0 is None else b0.double()
    result = base.clone()
    for w, C, D, E in updates:
        for row in range(o):
            prompt = sum(W0[row, k].item() * entry(C, k, 0) for k in range(i)) if C is not None else 0.0
            result[row] += w * (base[row].item() * channel(D, row) + channel(E, row) + prompt)
    return result


def linear(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """`x W^T + b` in float64."""
    y = x.double() @ W.double().T
    return y if b is None else y + b.double()
