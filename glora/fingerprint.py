"""A few numbers that tell one frozen tensor from another, whatever its device and dtype."""

from __future__ import annotations

import functools
import math
from collections.abc import MutableMapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from glora.precision import outside_autocast
from glora.tensors import dense, is_quantised, rows
from glora.torch_internals import is_view, writes_to

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
#
# To convert a tensor takes longer than to sum it up. So float32 on the CPU is multiplied as it is, a block at a time,
# which leaves errors of about 2^-23 n (of equal numbers, which all round to one side, up to 2^-12 n: it depends on how
# a processor adds). The blocks are added up in float64. Where squares might leave the range of float32, and for all
# other dtypes, each block is copied to float64, into memory that all blocks share: made anew, its pages would be
# cleared each time, which takes longer than both.
_ANGLES = ((1.0, 2.0), (2.0, 4.0), (4.0, 1.0))
_TOLERANCE, _SMALLEST = 2.0**-6, 2.0**-24
_CHUNK = 2**19  # numbers of a block: about what a cache holds
_SMALL = 2**12  # numbers of a matrix that is summed up by fewer calls
_SQUARES = 1e-20, 1e30  # sums of squares of which float32 loses nothing that counts

# Note [Fingerprints remembered]
# A frozen tensor is read once, and not again at each `save` and `load`: its fingerprint is kept as long as the tensor
# lives, beside what would not be the same after a change: its memory, dtype and layout, torch's count of in-place
# changes, and 64 of its numbers, since torch does not count what is written through `.data`. Kept here and not on the
# tensor, whose attributes would be pickled with it.
_SAMPLE = 64
_remembered: MutableMapping[Tensor, tuple[Any, Fingerprint | None]] = WeakIdKeyDictionary()


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Fingerprint | None:
    """The fingerprint of a tensor (Note [Fingerprints]), each number to six digits.

    Args:
        tensor: of any shape, floating dtype and device; read in blocks, so that no float64 copy stands in memory, and
            not again while it is the same (Note [Fingerprints remembered]).

    Returns:
        The norm and three sums; None for what has no numbers to sum, or not here: a tensor on the meta device, empty,
        of a subclass (sharded) that is not quantised, of no floating dtype, sparse, or not finite. Of a quantised
        tensor: that of the numbers it stands for.

    Example:
        >>> fingerprint(torch.eye(2))
        (1.41421, 0.775155, 1.27201, 0.646835)
    """
    quantised = is_quantised(tensor)
    if (type(tensor) not in (Tensor, nn.Parameter) and not quantised) or tensor.is_meta or not tensor.numel():
        return None
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        return None
    # A view is made anew for each call; an inference tensor has no count of changes.
    if quantised or tensor.is_inference() or not tensor.is_contiguous() or is_view(tensor):
        return _computed(tensor)
    sample = cast("Any", tensor.detach().view(-1)[:: max(1, tensor.numel() // _SAMPLE)]).tolist()
    state = writes_to(tensor), tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.device, sample
    known = _remembered.get(tensor)
    if known is None or known[0] != state:
        known = _remembered[tensor] = state, _computed(tensor)
    return known[1]


def _computed(tensor: Tensor) -> Fingerprint | None:
    # Not every other device has float64 (Apple's has not).
    device = tensor.device if tensor.device.type in ("cpu", "cuda") else torch.device("cpu")
    matrix = tensor.detach()
    matrix = matrix if is_quantised(tensor) else matrix.reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    narrow = tensor.dtype == torch.float32 and tensor.device.type == "cpu"
    with outside_autocast(matrix):
        sums = _sums(matrix, device, torch.float32 if narrow else torch.float64)
        if narrow and not _SQUARES[0] < sums[0] < _SQUARES[1]:
            sums = _sums(matrix, device, torch.float64)
    numbers = [float(f"{number:.6g}") for number in (math.sqrt(sums[0]), *sums[1:])]
    return tuple(numbers) if all(map(math.isfinite, numbers)) else None


def _sums(matrix: Tensor, device: torch.device, dtype: torch.dtype) -> list[float]:
    """The sum of squares, and that of each pair of angles, with blocks multiplied in this dtype."""
    count, columns = matrix.shape
    right = _cosines(1, 0, columns, device, dtype)
    step = min(max(1, _CHUNK // columns), count)
    there = (dtype, device) == (matrix.dtype, matrix.device)
    if step == count and count * columns <= _SMALL:
        # Calls take longest here: one product for all three.
        block = dense(matrix) if there else dense(matrix).to(device, dtype)
        left, flat = _cosines(0, 0, count, device, torch.float64), block.reshape(-1)
        weighted = cast("Any", (left * (right @ block.mT)).sum(1))
        return [torch.dot(flat, flat).item(), *weighted.tolist()]
    sums = torch.zeros(1 + len(_ANGLES), dtype=torch.float64, device=device)
    memory = None if there else torch.empty(step, columns, dtype=dtype, device=device)
    for start in range(0, count, step):
        stop = min(start + step, count)
        block = matrix if there and step == count and not is_quantised(matrix) else rows(matrix, slice(start, stop))
        block = block if memory is None else memory[: stop - start].copy_(block)
        left, flat = _cosines(0, start, stop, device, torch.float64), block.reshape(-1)
        # Three vectors one by one: a product with a matrix of three columns takes five times as long.
        pairs = zip(left.unbind(), right.unbind(), strict=True)
        products = [torch.dot(a, torch.mv(block, b).to(a.dtype)) for a, b in pairs]
        sums += torch.stack([torch.dot(flat, flat).to(sums.dtype), *products])
    return cast("Any", sums).tolist()


def _cosines(side: int, start: int, stop: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`cos(a i)` of the rows (side 0) or columns (side 1) i from start to stop: a row for each of `_ANGLES`."""
    # Most layers of a model have a few sizes, and of small ones the cosines take longest.
    make = _kept_cosines if stop - start <= _MOST_KEPT else _kept_cosines.__wrapped__
    return make(side, start, stop, device, dtype)


_MOST_KEPT = 4096


@functools.lru_cache(maxsize=64)
def _kept_cosines(side: int, start: int, stop: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    angles = torch.tensor([pair[side] for pair in _ANGLES], dtype=torch.float64, device=device)
    positions = torch.arange(start, stop, dtype=torch.float64, device=device)
    return torch.outer(angles, positions).cos().to(dtype)


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
    return alike(numbers, known, tensor.numel())


def alike(numbers: Sequence[float], known: Sequence[float], count: int) -> bool:
    """Whether two fingerprints may be of one tensor of so many numbers, up to rounding to half precision."""
    allowed = _TOLERANCE * max(numbers[0], known[0]) + _SMALLEST * math.sqrt(count)
    return len(numbers) == len(known) and all(abs(a - b) <= allowed for a, b in zip(numbers, known, strict=True))
