"""The cheapest way through an adapted nn.Linear, and the choice of it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from glora import functional
from glora.blocks import Scaled, blocked_linear
from glora.functional import Product

Way: TypeAlias = Literal["whole", "factored", "blocks", "few"]

# Note [Ways]
# One unit is the product of N tokens with W0. A frozen layer's training step costs 2 (forward, gradient of the input).
#
# - factored: a path that is low rank under a matrix product, or that scales whole channels, needs no W' at all:
#   y = (1 + a) * (x W0^T) + (x R_B^T) L_B^T + b', and a low-rank A of a matrix product is a B with the left factor
#   W0 L_A. 2 units and thin products. Every form but one.
# - blocks: the one is an elementwise low-rank A. 3 units, and nothing is saved (Note [Blocks]).
# - few: without a gradient, for a handful of tokens, that A too needs no W': with A = sum_k l_k r_k^T,
#   (W0 * A) x = sum_k l_k * (W0 (r_k * x)), so that r + 1 rescaled copies of x go through W0 in one product. It reads
#   W0 once, and writes nothing of W0's size; making W' reads and writes it several times. It pays as long as the
#   copies together are few: FEW_ROWS. By the clock (widths 1024 to 4096, float32) it won with 9 to 36 of them, and lost
#   or drew from 63 on.
# - whole: W' as anybody reads it from `layer.weight`, for what the others do not cover: a W0 that trains, another
#   parametrization on top, `parametrize.cached()`, torch.func's transforms and forward-mode derivatives of blocks (they
#   would need rules of their own), double backward (by `force("whole")`).
FEW_ROWS = 48

_forced: Way | None = None


@dataclass(frozen=True)
class Update:
    """One active adapter's paths on a weight: raw tensors with their scales; None where a path is none."""

    A: Scaled | None
    B: Scaled | None
    product: Product

    @property
    def is_elementwise_low_rank(self) -> bool:
        """Whether A is low rank under the elementwise product."""
        return self.A is not None and isinstance(self.A[0], tuple) and self.product == "hadamard"


@contextmanager
def force(way: Way | None) -> Generator[None]:
    """Take this way through every adapted layer that allows it, inside the `with` block: for debugging and tests.

    `"whole"` is always allowed, and supports double backward; `"factored"` where no A is low rank and elementwise,
    `"blocks"` and `"few"` where one is. None chooses by Note [Ways] again.

    Example:
        >>> import torch, glora
        >>> layer, x = glora.apply(torch.nn.Linear(4, 2)), torch.randn(3, 4)
        >>> with glora.ways.force("whole"):
        ...     y = layer(x)
        >>> torch.allclose(layer(x), y, atol=1e-6)
        True
    """
    global _forced
    before, _forced = _forced, way
    try:
        yield
    finally:
        _forced = before


def choose(updates: list[Update], tokens: int, needs_grad: bool) -> Way:
    """The way for these paths and this many tokens (Note [Ways]); what else forbids a short way is not asked here."""
    rank = sum(u.A[0][0].shape[1] for u in updates if u.is_elementwise_low_rank and u.A is not None)
    allowed: list[Way] = ["factored"]
    if any(update.is_elementwise_low_rank for update in updates):
        few = not needs_grad and tokens * (rank + 1) <= FEW_ROWS
        allowed = ["few", "blocks"] if few else ["blocks", "few"] if not needs_grad else ["blocks"]
    if _forced == "whole" or _forced in allowed:
        return _forced
    return allowed[0]


def linear(way: Way, x: Tensor, W0: Tensor, bias: Tensor | None, updates: list[Update]) -> Tensor:
    """`x W'^T + bias` by one of the short ways.

    Args:
        way: `"factored"`, `"blocks"` or `"few"`.
        x: `(..., in)`.
        W0: frozen weight, `(out, in)`.
        bias: the adapted bias, `(out,)`, or None.
        updates: the active adapters' paths.

    Returns:
        `(..., out)` in the dtype of `torch.nn.functional.linear`.
    """
    if x.shape[-1] != W0.shape[1]:
        return F.linear(x, W0, bias)  # raises as nn.Linear does
    elementwise, inputs, shifts = _sort(W0, updates)
    if way == "blocks":
        y = blocked_linear(x, W0, bias, elementwise, shifts, _dtype_of(x, W0))
        return (y + F.linear(_inputs(x, inputs), W0)).to(y.dtype) if inputs else y
    half = _dtype_of(x, W0) in (torch.bfloat16, torch.float16)
    if inputs and not elementwise and not half:
        x_scaled, inputs = x + _inputs(x, inputs), []
    else:  # in half precision a small change of the input would be rounded away
        x_scaled = x
    plain = not (elementwise or inputs or shifts)
    y, terms = (_few if way == "few" else _scaled_output)(x_scaled, W0, elementwise, bias if plain else None)
    if plain:
        return y
    if inputs:
        terms.append(F.linear(_inputs(x, inputs), W0))
    terms += [_shift(x, path) for path in shifts]
    # Term by term in float32 at least, and rounded once: a small update beside a large y.
    total = _wide(y)
    for term in terms:
        total = total + term
    return (total if bias is None else total + bias).to(y.dtype)


def _sort(W0: Tensor, updates: list[Update]) -> tuple[list[Scaled], list[Scaled], list[Scaled]]:
    """The paths by what they do: scale W0 entry by entry, scale the input's channels, or add to W0.

    A constant scales W0 alike under either product. A low-rank A of a matrix product adds `(W0 L) R`: W0 L is thin.
    """
    elementwise: list[Scaled] = []
    inputs: list[Scaled] = []
    shifts: list[Scaled] = []
    for update in updates:
        if update.A is not None:
            path, scale = update.A
            if isinstance(path, tuple) and update.product == "matmul":
                left = W0 @ (_wide(path[0]) * scale).to(W0.dtype)
                shifts.append(((left, path[1]), scale.new_ones(())))
            elif update.product == "matmul" and path.numel() > 1:  # pyright: ignore
                inputs.append(update.A)
            else:
                elementwise.append(update.A)
        if update.B is not None:
            shifts.append(update.B)
    return elementwise, inputs, shifts


def _scaled_output(
    x: Tensor, W0: Tensor, elementwise: list[Scaled], bias: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    y = F.linear(x, W0, bias)
    if not elementwise:
        return y, []
    return y, [y * _total([_output_scale(path) for path in elementwise])]


def _few(x: Tensor, W0: Tensor, elementwise: list[Scaled], bias: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    del bias  # there is an A: it is added last
    pairs = [(_wide(path[0]) * scale, path[1]) for path, scale in elementwise if isinstance(path, tuple)]
    left, right = torch.cat([pair[0] for pair in pairs], 1), torch.cat([pair[1] for pair in pairs], 0)
    copies = F.linear(torch.cat([x.unsqueeze(-2), x.unsqueeze(-2) * right.to(x.dtype)], -2), W0)  # (..., 1 + r, out)
    y, copied = copies[..., 0, :], copies[..., 1:, :]
    vectors = [path for path in elementwise if not isinstance(path[0], tuple)]
    terms = [y * _total([_output_scale(path) for path in vectors])] if vectors else []
    return y, [einsum(_wide(copied), left, "... r o, o r -> ... o"), *terms]


def _inputs(x: Tensor, paths: list[Scaled]) -> Tensor:
    """What paths that scale the input's channels add to it, `(..., in)`."""
    return (x * _total([_scaled(path) for path in paths]).squeeze(0)).to(x.dtype)


def _output_scale(path: Scaled) -> Tensor:
    """A vector `(out, 1)` or constant `(1,)` as it meets outputs `(..., out)`."""
    return rearrange(_scaled(path), "o ... -> (o ...)")


def _shift(x: Tensor, path: Scaled) -> Tensor:
    """What a path B adds to the output, `x B^T`."""
    tensors, scale = path
    if isinstance(tensors, tuple):
        left, right = tensors
        return F.linear(F.linear(x, right.to(x.dtype)), (_wide(left) * scale).to(x.dtype))
    return _wide(x).sum(-1, keepdim=True) * _output_scale(path)


def _total(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _scaled(path: Scaled) -> Tensor:
    tensor, scale = path
    assert isinstance(tensor, Tensor)
    return _wide(tensor) * scale


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(functional.working_dtype(tensor))


def _dtype_of(x: Tensor, W0: Tensor) -> torch.dtype:
    """The dtype of `F.linear(x, W0)`: autocast's where it is on (it leaves float64 alone), else x's."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and W0.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
