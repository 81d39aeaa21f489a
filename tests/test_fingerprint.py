"""Fingerprints tell tensors apart, and the same tensor again after any rounding."""

from __future__ import annotations

import gc
import itertools
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from glora.fingerprint import _computed, _kept_cosines, _remembered, agrees, fingerprint

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=3)


@st.composite
def tensors(draw: st.DrawFn, min_size: int = 1) -> Tensor:
    """Weights as models have them: random, constant, zero, tiny, or of a few outliers."""
    shape = draw(SIZES.filter(lambda sizes: torch.Size(sizes).numel() >= min_size))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from([1e-9, 0.02, 3.0]))
    kind = draw(st.sampled_from(["random", "constant", "outliers", "zero"]))
    if kind == "constant":
        tensor.fill_(draw(st.floats(-2, 2, allow_subnormal=False)))
    elif kind == "outliers":
        tensor[..., 0] *= 1000
    elif kind == "zero":
        tensor.zero_()
    return tensor


def independent(tensor: Tensor) -> list[float]:
    """The formula of Note [Fingerprints], entry by entry."""
    matrix = tensor.double().reshape(-1, tensor.shape[-1])
    i, j = torch.meshgrid(*(torch.arange(n).double() for n in matrix.shape), indexing="ij")
    sums = [((a * i).cos() * (b * j).cos() * matrix).sum().item() for a, b in ((1, 2), (2, 4), (4, 1))]
    return [matrix.norm().item(), *sums]


@given(tensors(), st.sampled_from([1, 7, 2**20]))
def test_it_is_the_formula_whatever_the_blocks(tensor: Tensor, block: int) -> None:
    with mock.patch("glora.fingerprint._CHUNK", block):
        found = fingerprint(tensor)
    assert found == pytest.approx(independent(tensor), rel=1e-4, abs=1e-5 * (1e-9 + tensor.norm().item()))


@given(tensors(), st.sampled_from(DTYPES))
def test_autocast_changes_nothing(tensor: Tensor, dtype: torch.dtype) -> None:
    tensor = tensor.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = fingerprint(tensor)
    assert found == _computed(tensor)


def test_cosines_of_small_matrices_are_computed_once() -> None:
    _kept_cosines.cache_clear()
    for columns in (3, 7, 3, 7):
        fingerprint(torch.randn(1009, columns))
        fingerprint(torch.randn(5, 5000))  # of large ones each time
    assert _kept_cosines.cache_info().misses == 4  # 1009 and 5 rows, 3 and 7 columns


@given(tensors(), st.permutations(DTYPES), st.booleans())
def test_the_same_tensor_is_known_again_after_any_rounding(
    tensor: Tensor, dtypes: list[torch.dtype], strided: bool
) -> None:
    known = fingerprint(tensor.to(dtypes[0]))
    assert known is not None
    other = tensor.to(dtypes[1])
    if strided:
        other = other.repeat_interleave(2, -1)[..., ::2]
    assert agrees(other, known)
    assert agrees(nn.Parameter(tensor.to(dtypes[0]).to(dtypes[1]).to(dtypes[2])), known)


@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 2**16), st.sampled_from(DTYPES))
def test_two_draws_of_one_distribution_are_told_apart(o: int, i: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.randn(o, i, generator=generator).mul(0.02).to(dtype) for _ in range(2))
    known = fingerprint(one)
    assert known is not None
    assert not agrees(other, known)
    assert not agrees(-one, known)
    assert not agrees(one * 1.05, known)
    assert not agrees(torch.zeros_like(one), known)


@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 2**16))
def test_rows_columns_and_sides_exchanged_are_told_apart(o: int, i: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(o, i, generator=generator)
    known = fingerprint(weight)
    assert known is not None
    assert not agrees(weight.t(), known)
    assert not agrees(weight.flip(0), known)
    assert not agrees(weight.roll(1, 1), known)
    assert not agrees(weight.t().reshape(o, i), known) or weight.t().reshape(o, i).equal(weight)


def test_two_rows_of_a_large_matrix_exchanged_are_told_apart() -> None:
    weight = torch.randn(300, 200)
    known = fingerprint(weight)
    assert known is not None
    swapped = weight.clone()
    swapped[[3, 250]] = weight[[250, 3]]
    assert not agrees(swapped, known)


def test_what_cannot_be_summed_has_none_and_agrees_with_all() -> None:
    class Sharded(Tensor):
        pass

    known = fingerprint(torch.randn(3, 2))
    assert known is not None
    for tensor in (
        torch.empty(3, 2, device="meta"),
        torch.empty(0, 2),
        torch.ones(3, 2, dtype=torch.long),
        torch.ones(3, 2, dtype=torch.complex64),
        torch.full((3, 2), torch.nan),
        torch.full((3, 2), 1e300, dtype=torch.float64),
        torch.randn(3, 2).as_subclass(Sharded),
    ):
        assert fingerprint(tensor) is None
        assert agrees(tensor, known)


class _Made(TorchDispatchMode):
    """How many numbers the tensors have that operations make anew; not what is written into memory that is there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.made.append(result.numel())
        return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_wide_copy_of_the_whole_stands_in_memory(dtype: torch.dtype) -> None:
    """One block of a tensor stands in memory, once for all of them; of a float32 one none does."""
    weight, counting = torch.randn(512, 256).to(dtype), _Made()
    with mock.patch("glora.fingerprint._CHUNK", 4096), counting:
        found = fingerprint(weight)
    assert found is not None
    assert found == pytest.approx(fingerprint(weight), rel=2e-6)
    if dtype != torch.float32:
        assert found == fingerprint(weight)
    large = [numbers for numbers in counting.made if numbers >= 4096]
    assert large == ([4096] if dtype in (torch.bfloat16, torch.float16) else [])


@given(st.integers(-37, 37), tensors())
def test_float32_that_has_no_squares_is_summed_as_float64(exponent: int, tensor: Tensor) -> None:
    """Of huge numbers and tiny ones the squares are infinite, or 0."""
    tensor = (tensor * 10.0**exponent).float().clamp(-3e38, 3e38)  # not beyond the largest float32
    # Equal numbers, added up one by one, each round by 2^-24 of the sum so far: how many so depends on the processor.
    error = 1e-5 + tensor.numel() * 2.0**-25
    exact = fingerprint(tensor.double())
    assert fingerprint(tensor) == pytest.approx(exact, rel=error, abs=error * tensor.norm().item())


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "in place": lambda p: p.detach().mul_(2),
    "one number, of which there is no sample": lambda p: p.detach()[0, 1].add_(1000),
    "under no_grad": lambda p: nn.init.normal_(p),
    "through data": lambda p: p.data.mul_(2),
    "other data": lambda p: setattr(p, "data", p.data * 2),
    "rounded": lambda p: setattr(p, "data", (p.data * 2).half()),
    "another shape": lambda p: setattr(p, "data", p.data.t().contiguous()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_tensor_is_read_once_as_long_as_it_is_the_same(change: Callable[[nn.Parameter], object]) -> None:
    weight, read = nn.Parameter(torch.randn(50, 20)), mock.Mock(side_effect=_computed)
    with mock.patch("glora.fingerprint._computed", read):
        first = fingerprint(weight)
        assert fingerprint(weight) == first
        assert read.call_count == 1
        change(weight)
        changed = fingerprint(weight)
        assert read.call_count == 2
    assert changed == fingerprint(weight.detach().clone()) != first


def test_what_is_remembered_dies_with_its_tensor_and_is_not_pickled() -> None:
    before, weight = len(_remembered), nn.Parameter(torch.randn(3, 3))
    size = len(pickle.dumps(weight))
    fingerprint(weight)
    assert len(_remembered) == before + 1
    assert len(pickle.dumps(weight)) == size
    del weight
    gc.collect()
    assert len(_remembered) <= before


def test_what_torch_does_not_count_is_read_each_time() -> None:
    with torch.inference_mode():
        weight = torch.randn(5, 4)
        first = fingerprint(weight)
        weight.mul_(2)
        assert fingerprint(weight) != first
    strided = torch.randn(4, 5).t()
    first = fingerprint(strided)
    strided.data[1, 1] += 9
    assert fingerprint(strided) != first


def test_the_pairs_of_angles_see_rows_and_columns_each_their_own_way() -> None:
    units = [torch.zeros(4, 4) for _ in range(16)]
    for unit, (i, j) in zip(units, itertools.product(range(4), repeat=2), strict=True):
        unit[i, j] = 1
    assert len({fingerprint(unit) for unit in units}) == 16


@pytest.mark.parametrize("shape", [(64, 32), (128,), (3, 16, 16)])
@pytest.mark.parametrize(
    ("share", "least", "most"), [(0.005, 0.99, 1.0), (0.01, 0.85, 1.0), (0.05, 0.0, 0.25), (0.2, 0.0, 0.02)]
)
def test_a_difference_of_one_to_two_percent_is_where_bases_part(
    shape: tuple[int, ...], share: float, least: float, most: float
) -> None:
    torch.manual_seed(0)
    agreeing = 0
    for _ in range(200):
        tensor, other = torch.randn(shape), torch.randn(shape)
        known = fingerprint(tensor)
        assert known is not None
        agreeing += agrees(tensor + share * other * tensor.norm() / other.norm(), known)
        assert not (share > 2**-6 and agrees(tensor * (1 + share), known))
    assert least <= agreeing / 200 <= most
