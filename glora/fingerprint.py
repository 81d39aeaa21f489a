"""A few numbers that tell one frozen tensor from another, whatever its device and dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from glora.tensors import is_quantised, rows

Fingerprint: TypeAlias = tuple[float, ...]
"""The Frobenius norm, and a sum weighted by position for each pair of `_ANGLES`."""

# Note [Fingerprints]
# A tensor is read as a matrix w, its last dimension the columns: n = ||w||, and sum_ij cos(a i) cos(b j) w_ij for three
# pairs of angles a, b. No two rows have the same weights, nor two columns, nor a row and a column: a permuted or
# transposed matrix has other sums. In units of n, two draws of one distribution differ by 0.7 (standard deviation) in
# each sum, and come within the tolerance of 2^-6 in all three in a few of a million cases. Rounding to bfloat16 moves
# each number by 2^-8 of it at most, and so a sum by less than 2^-8 n (standard deviation), a quarter of the tolerance.
# Float16 also rounds what is below its smallest number: 2^-25 a number at most. The price: another tensor that differs
# by less than 1 to 2% of n (a short training on, say) is taken for the same one.
_ANGLES = ((1.0, 2.0), (2.0, 4.0), (4.0, 1.0))
_TOLERANCE, _SMALLEST = 2.0**-6, 2.0**-24
_CHUNK = 2**20  # numbers that stand in memory as float64


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Fingerprint | None:
    """The fingerprint of a tensor (Note [Fingerprints]), each number to six digits.

    Args:
        tensor: of any shape, floating dtype and device; read in blocks, so that no float64 copy stands in memory.

    Returns:
        The norm and three sums; None for what has no numbers to sum, or not here: a tensor on the meta device, empty,
        of a subclass (sharded) that is not quantised, of no floating dtype, sparse, or not finite. Of a quantised tensor: that
        of the numbers it stands for.

    Example:
        >>> fingerprint(torch.eye(2))
        (1.41421, 0.775155, 1.27201, 0.646835)
    """
    quantised = is_quantised(tensor)
    if (type(tensor) not in (Tensor, nn.Parameter) and not quantised) or tensor.is_meta or not tensor.numel():
        return None
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        return None
    # Not every other device has float64 (Apple's has not).
    device = tensor.device if tensor.device.type in ("cpu", "cuda") else torch.device("cpu")
    matrix = tensor.detach()
    matrix = matrix if quantised else matrix.reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    count, columns = matrix.shape
    angles = torch.tensor(_ANGLES, dtype=torch.float64, device=device)
    right = torch.outer(_positions(0, columns, device), angles[:, 1]).cos()  # (columns, 3)
    square, sums = torch.zeros((), dtype=torch.float64, device=device), torch.zeros_like(angles[:, 0])
    step = max(1, _CHUNK // columns)
    for start in range(0, count, step):
        block = rows(matrix, slice(start, min(start + step, count))).to(device, torch.float64)
        left = torch.outer(_positions(start, start + len(block), device), angles[:, 0]).cos()  # (rows, 3)
        square += torch.dot(block.reshape(-1), block.reshape(-1))
        sums += (left * (block @ right)).sum(0)
    numbers = [float(f"{number.item():.6g}") for number in (square.sqrt(), *sums.cpu())]
    return tuple(numbers) if all(map(math.isfinite, numbers)) else None


_ROWS = 32


def end_of(tensor: Tensor) -> Tensor:
    """The last rows of a tensor: enough to tell whether it is random, and where an embedding's new words are.

    The frozen parameters that an adapter does not change are known by their ends, since they may be most of a model. A
    head that was new then, or words that were added, are in no checkpoint, and other numbers in every process.
    """
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.ndim > 1 and tensor.numel() > 0
    plain = plain and tensor.layout == torch.strided
    return tensor.detach().reshape(-1, tensor.shape[-1])[-_ROWS:] if plain else tensor


def agrees(tensor: Tensor, known: Sequence[float]) -> bool:
    """Whether a tensor has this fingerprint, up to rounding to half precision; a tensor without one has any."""
    numbers = fingerprint(tensor)
    if numbers is None:
        return True
    allowed = _TOLERANCE * max(numbers[0], known[0]) + _SMALLEST * math.sqrt(tensor.numel())
    return len(numbers) == len(known) and all(abs(a - b) <= allowed for a, b in zip(numbers, known, strict=True))


def _positions(start: int, stop: int, device: torch.device) -> Tensor:
    return torch.arange(start, stop, dtype=torch.float64, device=device)
