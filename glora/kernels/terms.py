"""What the acting adapters do to one W0, added up: the form that every kernel takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from glora.functional import WeightFactors
from glora.kernels import row_blocks
from glora.precision import as_dtype, working_dtype

Pair: TypeAlias = tuple[Tensor, Tensor]


class Terms(NamedTuple):
    """`W' = W0 * (1 + outputs + inputs + entries) + shift`; None for a term that no adapter has.

    All in the `working_dtype` of W0. A pair `(out, r)`, `(r, in)` stands for its matrix product.

    Attributes:
        outputs: scales output channels, `(out,)`.
        inputs: scales input channels, `(in,)`.
        entries: scales entries, a pair.
        shift: is added, a pair.
    """

    outputs: Tensor | None
    inputs: Tensor | None
    entries: Pair | None
    shift: Pair | None

    def as_entries(self) -> Pair | None:
        """All scaling terms as one pair, a vector as a component of rank one; None where no adapter scales entries."""
        if self.entries is None or (self.outputs is None and self.inputs is None):
            return self.entries
        left, right = self.entries
        pairs = [self.entries]
        if self.outputs is not None:
            pairs.append((self.outputs.unsqueeze(1), right.new_ones(1, right.shape[1])))
        if self.inputs is not None:
            pairs.append((left.new_ones(left.shape[0], 1), self.inputs.unsqueeze(0)))
        return _side_by_side(pairs, left.dtype)


def terms_of(W0: Tensor, adapters: Sequence[WeightFactors]) -> Terms:
    """The terms of all adapters together on W0, `(out, in)`.

    A constant scales W0 alike under either product. A low-rank A of a matrix product shifts W0 by `(W0 left) right`.
    """
    dtype = working_dtype(W0)
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []
    entries: list[Pair] = []
    shifts: list[Pair] = []
    for A, B, product in adapters:
        if A is not None:
            factor = A.scaled()
            if isinstance(factor, tuple):
                if product == "hadamard":
                    entries.append(factor)
                else:
                    shifts.append((row_blocks.thin_product(W0, factor[0]), factor[1]))
            elif product == "matmul" and factor.ndim > 1:
                inputs.append(factor.flatten())
            else:
                outputs.append(factor.flatten().expand(W0.shape[0]))
        if B is not None:
            factor = B.scaled()
            if not isinstance(factor, tuple):
                factor = factor.reshape(-1, 1).expand(W0.shape[0], 1), factor.new_ones(1, W0.shape[1])
            shifts.append(factor)
    return Terms(
        as_dtype(reduce(add, outputs), dtype) if outputs else None,
        as_dtype(reduce(add, inputs), dtype) if inputs else None,
        _side_by_side(entries, dtype) if entries else None,
        _side_by_side(shifts, dtype) if shifts else None,
    )


def _side_by_side(pairs: Sequence[Pair], dtype: torch.dtype) -> Pair:
    """The sum of pairs as one; a single one uncopied."""
    left, right = pairs[0]
    if len(pairs) > 1:
        left, right = torch.cat([left for left, _ in pairs], 1), torch.cat([right for _, right in pairs])
    return (left, right) if left.dtype == right.dtype == dtype else (left.to(dtype), right.to(dtype))
