"""A half-precision matrix times a float32 vector: exact as the wide product, in every order and kind of derivative."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import internals
from tests.helpers.counting import count_saved


@given(
    st.integers(0, 7),
    st.integers(0, 7),
    st.booleans(),
    st.sampled_from([1, 5, 2**20]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)
def test_it_is_the_product_of_the_wide_matrix_in_values_and_gradients(
    m: int, n: int, transposed: bool, entries: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    matrix = torch.randn(m, n).to(torch.bfloat16).requires_grad_()
    vector = torch.randn(m if transposed else n, dtype=dtype, requires_grad=True)
    with internals.entries_of_a_block(entries), torch.autocast("cpu", torch.bfloat16):
        found = internals.wide_matvec(matrix, vector, transposed=transposed)
    wide = matrix.to(dtype)
    wanted = (wide.T if transposed else wide) @ vector
    torch.testing.assert_close(found, wanted)
    weights = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad(found, (matrix, vector), weights),
        torch.autograd.grad(wanted, (matrix, vector), weights),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("transposed", [False, True])
def test_derivatives_of_every_kind(transposed: bool) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(3, 4).bfloat16()
    vector = torch.randn(3 if transposed else 4, dtype=torch.float64, requires_grad=True)
    wide = (matrix.T if transposed else matrix).double()

    def function(vector: torch.Tensor) -> torch.Tensor:
        return internals.wide_matvec(matrix, vector, transposed=transposed)

    assert torch.autograd.gradcheck(function, vector, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, vector)
    batch = torch.randn(5, vector.shape[0], dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(function)(batch), batch @ wide.T)
    torch.testing.assert_close(torch.func.jacrev(function)(batch[0]), wide)
    torch.testing.assert_close(torch.func.jacfwd(function)(batch[0]), wide)


def test_only_the_matrix_and_the_vector_are_saved() -> None:
    matrix, vector = torch.randn(64, 64).bfloat16(), torch.randn(64, requires_grad=True)
    with count_saved([matrix, vector]) as saved:
        internals.wide_matvec(matrix, vector).sum()
    assert saved.bytes == 0
