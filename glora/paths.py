"""One small module for each form of a path; `none` is the absence of a module.

A path's output is what `glora.functional` takes: a tensor, or a pair `(left, right)`. It is already scaled, by
`alpha / rank` and by the adapter's weight; scaling the thin factor costs r numbers a channel, scaling the product would
cost a whole matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from glora.functional import Product, working_dtype


class LowRank(nn.Module):
    """`scaling * left @ right`, of rank r at most.

    Args:
        rows: first dimension of `left`, `(rows, rank)`.
        columns: second dimension of `right`, `(rank, columns)`.
        rank: r, the width of both.
        scaling: `alpha / rank`.
    """

    def __init__(
        self, rows: int, columns: int, rank: int, scaling: float, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(rows, rank, dtype=dtype, device=device))
        self.right = nn.Parameter(torch.empty(rank, columns, dtype=dtype, device=device))
        self.scaling = scaling

    def forward(self, strength: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """The pair `(left, right)`, scaled."""
        (left, right), scale = self.raw(strength, dropout)
        return left.to(working_dtype(left)) * scale, right

    def raw(self, strength: Tensor, dropout: float = 0.0) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The factors themselves, and the scale of left's columns: one number, or with `dropout` a fresh draw of r."""
        scale = strength if self.scaling == 1.0 else strength * self.scaling
        if dropout:
            left = self.left
            kept = torch.empty(left.shape[1], dtype=working_dtype(left), device=left.device).bernoulli_(1 - dropout)
            scale = kept * (scale / (1 - dropout))  # Note [Rank dropout]
        return (self.left, self.right), scale

    # Note [Rank dropout]
    # Each of the r components is kept with probability 1 - p and then scaled by 1 / (1 - p), so that the expectation of
    # left @ right is the product without dropout. It is drawn in the layer's forward, in training, and nowhere else:
    # whoever reads `layer.weight` (a merge above all) gets that expectation, and nothing dropped is ever baked in.

    @torch.no_grad()
    def reset_parameters(self, spread: float | None) -> None:
        """Start at zero with a Kaiming-uniform `right` (None), or with entries of left @ right of size `spread`."""
        if spread is None:
            nn.init.zeros_(self.left)
            nn.init.kaiming_uniform_(self.right, a=math.sqrt(5))
        else:
            each = math.sqrt(spread / (self.scaling * math.sqrt(self.left.shape[1])))
            _draw(self.left, each)
            _draw(self.right, each)


class Vector(nn.Module):
    """One number a channel."""

    def __init__(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

    def forward(self, strength: Tensor, dropout: float = 0.0) -> Tensor:  # noqa: ARG002 - no rank, nothing to drop
        """The value, scaled."""
        return self.value.to(working_dtype(self.value)) * strength

    def raw(self, strength: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - nothing to drop
        """The value itself, and its scale."""
        return self.value, strength

    @torch.no_grad()
    def reset_parameters(self, spread: float | None) -> None:
        """Start at zero (None), or with entries of size `spread`."""
        if spread is None:
            nn.init.zeros_(self.value)
        else:
            _draw(self.value, spread)


class Constant(Vector):
    """One number for all: a vector of one entry, `(1,)` and not 0-dimensional, which FSDP refuses to shard."""

    def __init__(self, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__((1,), dtype=dtype, device=device)


def shapes(
    path: str, form: str, *, out_features: int, in_features: int, rank: int, product: Product
) -> dict[str, tuple[int, ...]]:
    """Factor name to shape of one path: `left` and `right`, or `value`; nothing for `"none"`.

    Example:
        >>> shapes("C", "lora", out_features=3, in_features=5, rank=2, product="hadamard")
        {'left': (5, 2), 'right': (2, 1)}
    """
    o, i = out_features, in_features
    scales_inputs = path == "A" and product == "matmul"
    if form == "none":
        return {}
    if form == "constant":
        return {"value": (1,)}
    if form == "vector":
        return {"value": (o,) if path in "DE" else (i, 1) if path == "C" else (1, i) if scales_inputs else (o, 1)}
    rows, columns = (i, 1) if path == "C" else (i, i) if scales_inputs else (o, i)
    return {"left": (rows, rank), "right": (rank, columns)}


def build(
    path: str,
    form: str,
    weight: Tensor,
    *,
    rank: int,
    scaling: float,
    product: Product,
    dtype: torch.dtype,
) -> nn.Module:
    """The module of one path of a layer with this weight, uninitialised, on the weight's device."""
    out_features, in_features = weight.shape
    factors = shapes(path, form, out_features=out_features, in_features=in_features, rank=rank, product=product)
    device = weight.device
    if form == "lora":
        return LowRank(factors["left"][0], factors["right"][1], rank, scaling, dtype=dtype, device=device)
    if form == "vector":
        return Vector(factors["value"], dtype=dtype, device=device)
    return Constant(dtype=dtype, device=device)


def spread(path: str, form: str, weight: Tensor, product: Product) -> float:
    """The size of the path's entries with which it moves W' (or b') by about a tenth of W0's norm.

    With `n = ||W0||` (Frobenius): entries of A of size s move W' by `s n` (elementwise) or, when A is a whole random
    matrix, by `s sqrt(in) n` (matrix product); B by `s sqrt(out in)`; C moves b' by about `s n`, D by `s ||b0||`,
    E by `s sqrt(out)`.
    """
    out_features, in_features = weight.shape
    if path in "ACD":
        return 0.1 / math.sqrt(in_features) if (path, form, product) == ("A", "lora", "matmul") else 0.1
    norm = weight.detach().to(working_dtype(weight)).square().sum().sqrt().item()
    # A weight of zeros has no size to go by; that of nn.Linear's own start stands in.
    norm = norm if norm > 0 else math.sqrt(out_features)
    return 0.1 * norm / math.sqrt(out_features * (in_features if path == "B" else 1))


def _draw(factor: Tensor, size: float) -> None:
    # Away from zero in every entry (0.5 to 1.5 of `size`, either sign): even a layer of 1 x 1 is moved.
    factor.uniform_(0.5 * size, 1.5 * size)
    factor.mul_(torch.empty_like(factor).bernoulli_(0.5).mul_(2).sub_(1))
