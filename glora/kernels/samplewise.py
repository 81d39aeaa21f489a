"""Layers that need no W', with other factors for each sample: one product with W0 for the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from glora.kernels import factored
from glora.kernels.terms import Pair, Terms
from glora.precision import as_dtype, outside_autocast, wide, working_dtype

# Note [One product for all samples]
# Samples of different adapters have W0 in common: y = (1 + a_s) * (x_s W0^T) + (x_s R_s^T) L_s^T + b'_s. Each sample s
# gathers the vectors and factors of its adapter from a stack of all of them, so that no sample is moved. Adapters of a
# smaller rank are filled up with zeros, which add nothing.
#
# The thin products are a batch of small ones, for which each sample's factors are gathered: that writes and reads
# samples * r * (in + out) numbers. With few tokens that is more than the products themselves, and it is cheaper to
# multiply all rows by all adapters' factors and mask the others' out with zeros: by the clock (1024 x 1024, 64 samples
# of rank 8) up to about MASKED tokens in a sample times adapters.
MASKED = 64

# Samples of adapters that need a W' go through it on their own, and the others together. That moves samples, so that
# with many rows it is quicker to let each adapter's go on their own (which are then views of the batch as a rule): by
# the clock (widths 256 and 1024, 12 samples of five adapters and the base) 0.83 to 0.91 of that up to 192 rows, and
# 1.04 to 1.10 of it with 768.
SPLIT = 256


def linear(
    x: Tensor,
    W0: Tensor,
    biases: Sequence[Tensor | None],
    terms: Sequence[Terms],
    owner: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`x_s W'^T + b'` for each sample s, with the W' and b' of the group that owns it.

    Args:
        x: `(samples, tokens, in)`.
        W0: frozen weight, `(out, in)`.
        biases: of each group the adapted bias, `(out,)`; None for all or for none.
        terms: of each group; none scales entries.
        owner: `(samples,)`, the number of each sample's group.
        dtype: of the product with W0 and of the result.

    Returns:
        `(samples, tokens, out)` in `dtype`.
    """
    bias = biases[0]
    with outside_autocast(x):
        x = as_dtype(x, dtype)
        if any(other is not bias for other in biases):
            bias = torch.stack([cast("Tensor", each) for each in biases])[owner].unsqueeze(1)
        outputs = _gather([group.outputs for group in terms], owner)
        inputs = _gather([group.inputs for group in terms], owner)
        y = factored.scaled_product(x, as_dtype(W0, dtype), bias, Terms(outputs, inputs, None, None), dtype)
        if any(group.shift for group in terms):
            y = _shift(wide(y), x, [_pair(group.shift, W0) for group in terms], owner)
        return as_dtype(y, dtype)


def _gather(vectors: Sequence[Tensor | None], owner: Tensor) -> Tensor | None:
    """Each sample's vector, `(samples, 1, size)`: zeros where its group has none; None where no group has any."""
    like = next((vector for vector in vectors if vector is not None), None)
    if like is None:
        return None
    return torch.stack([torch.zeros_like(like) if vector is None else vector for vector in vectors])[owner].unsqueeze(1)


def _pair(pair: Pair | None, W0: Tensor) -> Pair:
    """The pair, of rank 0 where it is None."""
    if pair is not None:
        return pair
    (out_features, in_features), dtype = W0.shape, working_dtype(W0)
    return W0.new_zeros(out_features, 0, dtype=dtype), W0.new_zeros(0, in_features, dtype=dtype)


def _shift(y: Tensor, x: Tensor, pairs: Sequence[Pair], owner: Tensor) -> Tensor:
    """`y + (x right^T) left^T`, with each sample's own pair; y is written over."""
    x = as_dtype(x, y.dtype)
    ranks = [left.shape[1] for left, _ in pairs]
    if x.shape[1] * len(pairs) > MASKED:
        most = max(ranks)
        left = torch.stack([F.pad(left, (0, most - rank)) for (left, _), rank in zip(pairs, ranks, strict=True)])
        right = torch.stack(
            [F.pad(right, (0, 0, 0, most - rank)) for (_, right), rank in zip(pairs, ranks, strict=True)]
        )
        left, right = (as_dtype(factor, y.dtype)[owner].mT for factor in (left, right))
        return y.baddbmm_(torch.bmm(x, right), left)
    left, right = torch.cat([left for left, _ in pairs], 1), torch.cat([right for _, right in pairs])
    of_columns = torch.arange(len(pairs)).repeat_interleave(torch.tensor(ranks)).to(owner.device)
    own = owner.unsqueeze(1) == of_columns  # (samples, sum of r)
    thin = F.linear(x, as_dtype(right, y.dtype)) * own.unsqueeze(1)
    y.flatten(0, 1).addmm_(thin.flatten(0, 1), as_dtype(left, y.dtype).T)
    return y
