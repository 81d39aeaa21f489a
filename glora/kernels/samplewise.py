"""A layer that needs no W', with other factors for each sample: one product with W0 for the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from glora.functional import Factors, WeightFactors
from glora.kernels.factored import pair_of, product, sort_paths, total_of
from glora.precision import outside_autocast, wide

# Note [One product for all samples]
# Samples of different adapters have W0 in common: y = (1 + a_s) * (x_s W0^T) + (x_s R_s^T) L_s^T + b'_s, or with
# rescaled copies of x_s (Note [Kernels]). Each sample s takes the vectors and factors of its adapter from a stack of
# all of them, so that no sample is moved. Adapters of a smaller rank are filled up with zeros, which add nothing.
#
# The thin products are a batch of small ones, for which each sample's factors are gathered: that writes and reads
# samples * r * (in + out) numbers. With few tokens it is more than the products themselves, and it is cheaper to
# multiply all rows by all groups' factors and let zeros mask out the others: by the clock (1024 x 1024, 64 samples of
# rank 8) up to about MASKED tokens in a sample times groups.
MASKED = 64


def linear(
    x: Tensor,
    W0: Tensor,
    biases: Sequence[Tensor | None],
    groups: Sequence[Sequence[WeightFactors]],
    owner: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`x_s W'^T + b'` for each sample s, with the W' and b' of the group that owns it.

    Args:
        x: `(samples, tokens, in)`.
        W0: frozen weight, `(out, in)`.
        biases: of each group the adapted bias, `(out,)`; None for all or for none.
        groups: of each group the paths that act; a low-rank elementwise A only without gradients, for few tokens.
        owner: `(samples,)`, the number of each sample's group.
        dtype: that of the product with W0 and of the result.

    Returns:
        `(samples, tokens, out)` in `dtype`.
    """
    half, (out_features, in_features) = dtype in (torch.bfloat16, torch.float16), W0.shape
    paths = [sort_paths(W0, adapters, dtype) for adapters in groups]
    copied = [[path for path in found if isinstance(path.tensors, tuple)] for found, _, _ in paths]
    vectors = [[path for path in found if isinstance(path.tensors, Tensor)] for found, _, _ in paths]
    scales, inputs = _vectors(vectors, out_features), _vectors([found for _, found, _ in paths], in_features)
    bias = biases[0]
    with outside_autocast(x):
        rows, W = x.to(dtype), W0.to(dtype)
        scaled = rows if half or inputs is None else rows * (1 + inputs[owner].unsqueeze(1))
        if any(copied):
            y, update = _expand(scaled, W, *_stack(copied, W0), owner)
        else:
            y, update = product(scaled, W, half) if scales is not None else F.linear(scaled, W), None
        # In half precision what is added would be rounded away, and so would a small change of the input.
        y = wide(y)
        if scales is not None:
            y = y * (1 + scales[owner].unsqueeze(1))
        if half and inputs is not None:
            y = y.add_(F.linear((rows * inputs[owner].unsqueeze(1)).to(dtype), W))
        if update is not None:
            y = y.add_(update)
        if bias is not None and any(other is not bias for other in biases):
            bias = torch.stack([cast("Tensor", each) for each in biases])[owner].unsqueeze(1)
        y = y if bias is None else y.add_(bias)
        if any(found for _, _, found in paths):
            y = _shift(y, rows.to(y.dtype), [found for _, _, found in paths], owner, W0)
        return y.to(dtype)


def _vectors(groups: Sequence[Sequence[Factors]], size: int) -> Tensor | None:
    """The sum of each group's vectors and constants, `(groups, size)`; None where no group has any."""
    totals = [total_of(paths).flatten().expand(size) if paths else None for paths in groups]
    like = next((total for total in totals if total is not None), None)
    if like is None:
        return None
    return torch.stack([torch.zeros_like(like) if total is None else total for total in totals])


def _pairs(groups: Sequence[Sequence[Factors]], W0: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The joined factors of each group's paths, `(out, r)` and `(r, in)`, with r = 0 where it has none."""
    none = W0.new_zeros(W0.shape[0], 0), W0.new_zeros(0, W0.shape[1])
    return [pair_of(paths, *W0.shape) if paths else none for paths in groups]


def _stack(groups: Sequence[Sequence[Factors]], W0: Tensor) -> tuple[Tensor, Tensor]:
    """The same as two tensors, `(groups, out, r)` and `(groups, r, in)`: zeros where a group has a smaller rank."""
    pairs = _pairs(groups, W0)
    rank = max(left.shape[1] for left, _ in pairs)
    filled = [
        (left, right)
        if left.shape[1] == rank
        else (F.pad(left, (0, rank - left.shape[1])), F.pad(right, (0, 0, 0, rank - left.shape[1])))
        for left, right in pairs
    ]
    return torch.stack([left for left, _ in filled]), torch.stack([right for _, right in filled])


def _expand(x: Tensor, W: Tensor, left: Tensor, right: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """`x W^T` and what each sample's elementwise A adds to it, from rescaled copies of x."""
    copies = x.unsqueeze(2) * right.to(x.dtype)[owner].unsqueeze(1)  # (samples, tokens, r, in)
    products = F.linear(torch.cat([x.unsqueeze(2), copies], 2), W)
    products = wide(products)
    return products[:, :, 0], einsum(products[:, :, 1:], left.to(products.dtype)[owner], "s n r o, s o r -> s n o")


def _shift(y: Tensor, x: Tensor, groups: Sequence[Sequence[Factors]], owner: Tensor, W0: Tensor) -> Tensor:
    """`y + x B^T`, with each sample's own B; y is written over."""
    if x.shape[1] * len(groups) > MASKED:
        left, right = (factor.to(y.dtype)[owner].mT for factor in _stack(groups, W0))
        return y.baddbmm_(torch.bmm(x, right), left)
    pairs = _pairs(groups, W0)
    left, right = (
        torch.cat([left for left, _ in pairs], 1).to(y.dtype),
        torch.cat([right for _, right in pairs]).to(y.dtype),
    )
    of_columns = torch.tensor([number for number, (left, _) in enumerate(pairs) for _ in range(left.shape[1])])
    own = owner.unsqueeze(1) == of_columns.to(owner.device)  # (samples, sum of r)
    y.flatten(0, 1).addmm_((F.linear(x, right) * own.unsqueeze(1)).flatten(0, 1), left.T)
    return y
