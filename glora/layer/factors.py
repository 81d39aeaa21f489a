"""One small module for each form of a path; `none` is the absence of a module.

Each holds raw tensors and hands them out with their scale, as `glora.functional.Factors`. Who multiplies them, and
when, is the business of whoever reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from glora.config import GLoRAConfig
from glora.functional import Factors
from glora.precision import wide, working_dtype
from glora.tensors import dense, gathered, is_sharded, sharded_like


class LowRank(nn.Module):
    """`left @ right`, of rank r at most, times `scaling`.

    Args:
        left: (..., rows, r).
        right: (..., r, columns).
        config: gives `alpha / rank` and the rate of rank dropout.
    """

    def __init__(self, left: Tensor, right: Tensor, config: GLoRAConfig) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)
        self.scaling = config.scaling
        self.dropout = config.rank_dropout

    def factors(self, scale: Tensor, dropout: bool = False) -> Factors:
        """`(left, right)` and the scale of left's columns: one number, or with `dropout` a fresh draw of r."""
        if self.scaling != 1.0:
            scale = scale * self.scaling
        if dropout and self.dropout:
            left, kept = self.left, 1 - self.dropout
            drawn = torch.empty(left.shape[-1], dtype=working_dtype(left), device=left.device).bernoulli_(kept)
            scale = drawn * (scale / kept)  # Note [Rank dropout]
        return Factors((self.left, self.right), scale)

    # Note [Rank dropout]
    # Each of the r components is kept with probability 1 - p and then scaled by 1 / (1 - p), so that the expectation of
    # left @ right is the product without dropout. It is drawn in the layer's forward, in training, and nowhere else:
    # whoever reads `layer.weight` (a merge above all) gets that expectation, and nothing dropped is ever baked in.

    @torch.no_grad()
    def reset_parameters(self, size: float | None) -> None:
        """Start at zero with a Kaiming-uniform `right` (None), or with entries of the product of about `size`."""
        if size is None:
            nn.init.zeros_(self.left)
            _fill(self.right, _kaiming)
        else:
            each = math.sqrt(size / (self.scaling * math.sqrt(self.left.shape[-1])))
            _draw(self.left, each)
            _draw(self.right, each)

    def extra_repr(self) -> str:
        """The factors' shapes and the scale, for `print(layer)`."""
        return f"left={tuple(self.left.shape)}, right={tuple(self.right.shape)}, scale={self.scaling:g}"


class Vector(nn.Module):
    """One number a channel; or one for all, `(1,)` and not 0-dimensional, which FSDP refuses to shard."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def factors(self, scale: Tensor, dropout: bool = False) -> Factors:  # noqa: ARG002 - no rank, nothing to drop
        """The value and its scale."""
        return Factors(self.value, scale)

    @torch.no_grad()
    def reset_parameters(self, size: float | None) -> None:
        """Start at zero (None), or with entries of about `size`."""
        if size is None:
            nn.init.zeros_(self.value)
        else:
            _draw(self.value, size)

    def extra_repr(self) -> str:
        """The value's shape, for `print(layer)`."""
        return f"value={tuple(self.value.shape)}"


def init_size(path: str, config: GLoRAConfig, weight: Tensor) -> float | None:
    """The size of the path's entries at the start; None for the start that changes nothing.

    A random start moves W' (or b') by about a tenth of W0's norm. With `n = ||W0||` (Frobenius): entries of A of size s
    move W' by `s n` (elementwise) or, when A is a whole random matrix, by `s sqrt(in) n` (matrix product); B by
    `s sqrt(out in)`; C moves b' by about `s n`, D by `s ||b0||`, E by `s sqrt(out)`. Of a batch of matrices, the same
    for each, by their root mean square norm.
    """
    if config.init == "identity" or weight.is_meta:
        return None
    *batch, out_features, in_features = weight.shape
    if path in "ACD":
        whole = (path, config.A, config.product) == ("A", "lora", "matmul")
        return 0.1 / math.sqrt(in_features) if whole else 0.1
    weight = dense(gathered(weight.detach()))
    norm = wide(weight).square().sum().sqrt().item() / math.sqrt(math.prod(batch))
    # A weight of zeros has no size to go by; that of nn.Linear's own start stands in.
    norm = norm if norm > 0 else math.sqrt(out_features)
    return 0.1 * norm / math.sqrt(out_features * (in_features if path == "B" else 1))


def _draw(factor: Tensor, size: float) -> None:
    def draw(tensor: Tensor) -> None:
        # Away from zero in every entry (0.5 to 1.5 of `size`, either sign): even a layer of 1 x 1 is moved.
        tensor.uniform_(0.5 * size, 1.5 * size)
        tensor.mul_(torch.empty_like(tensor).bernoulli_(0.5).mul_(2).sub_(1))

    _fill(factor, draw)


def _kaiming(right: Tensor) -> None:
    nn.init.kaiming_uniform_(right.flatten(0, -2), a=math.sqrt(5))  # each row goes by its own length


def _fill(factor: Tensor, fill: Callable[[Tensor], object]) -> None:
    """Fill a factor at random; a sharded one with parts of one draw (ranks of one seed would draw equal parts)."""
    if is_sharded(factor) and not factor.is_meta:
        drawn = torch.empty(factor.shape, dtype=factor.dtype, device=factor.device)
        fill(drawn)
        factor.copy_(sharded_like(factor, drawn, from_first=True))
    else:
        fill(factor)
