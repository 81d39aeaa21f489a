"""The formula against the reference: every form, product and dtype; derivatives; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from glora import functional
from glora.precision import multiply
from tests.helpers import reference
from tests.helpers.marks import examples
from tests.helpers.strategies import DTYPES, close

WEIGHT_FORMS = ["none", "lora", "vector", "constant", "whole"]
PROMPT_FORMS = ["none", "lora", "vector"]
BIAS_FORMS = ["none", "vector", "constant"]


def make(path: str, form: str, o: int, i: int, r: int, product: str, dtype: torch.dtype) -> reference.Path:
    rows, columns = (i, 1) if path == "C" else (i, i) if path == "A" and product == "matmul" else (o, i)
    shapes = {"lora": (rows, columns), "whole": (rows, columns), "constant": (1,)}
    shapes["vector"] = (o,) if path in "DE" else (1, i) if (path, product) == ("A", "matmul") else (rows, 1)
    if form == "none":
        return None
    if form == "lora":
        return torch.randn(rows, r, dtype=dtype), torch.randn(r, columns, dtype=dtype)
    return torch.randn(shapes[form], dtype=dtype)


sizes = st.tuples(st.integers(1, 33), st.integers(1, 17), st.integers(1, 4))


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("A_form", WEIGHT_FORMS)
@examples(20)
@given(
    size=sizes,
    dtype=st.sampled_from(DTYPES),
    B_form=st.sampled_from(WEIGHT_FORMS),
    own=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
)
def test_weight_is_the_reference_whatever_the_dtypes(
    size: Any, dtype: torch.dtype, A_form: str, B_form: str, product: str, own: tuple[torch.dtype, torch.dtype]
) -> None:
    # Factors may be of half precision too: they are widened before anything is multiplied or added.
    o, i, r = size
    W0 = torch.randn(o, i).to(dtype)
    A, B = make("A", A_form, o, i, r, product, own[0]), make("B", B_form, o, i, r, "", own[1])
    W = functional.weight(W0, A, B, product=product)
    assert W.dtype == dtype
    # A pair's product is computed in float32, unless one of the two is float64.
    precision = torch.float32 if dtype == torch.float64 and set(own) != {torch.float64} else dtype
    assert close(W.to(precision), reference.weight(W0, [(1.0, A, B, product)]), ulps=32)


@given(
    sizes,
    st.sampled_from(DTYPES),
    st.sampled_from(PROMPT_FORMS),
    st.sampled_from(BIAS_FORMS),
    st.sampled_from(BIAS_FORMS),
    st.booleans(),
    st.booleans(),
)
def test_bias_is_the_reference(
    size: Any, dtype: torch.dtype, C_form: str, D_form: str, E_form: str, no_b0: bool, same_dtype: bool
) -> None:
    o, i, r = size
    wide = dtype if same_dtype else torch.promote_types(dtype, torch.float32)
    W0, b0 = torch.randn(o, i).to(dtype), None if no_b0 else torch.randn(o).to(dtype)
    C = make("C", C_form, o, i, r, "", wide)
    D = None if no_b0 else make("D", D_form, o, i, r, "", wide)
    E = make("E", E_form, o, i, r, "", wide)
    b = functional.bias(W0, b0, C, D, E)
    if b is None:
        assert no_b0
        assert C is None
        assert E is None
        return
    assert b.dtype == dtype
    assert close(b, reference.bias(W0, b0, [(1.0, C, D, E)]), ulps=32)


@given(sizes, st.sampled_from(WEIGHT_FORMS), st.sampled_from(PROMPT_FORMS), st.booleans(), st.booleans())
def test_linear_is_the_layer_of_weight_and_bias(size: Any, form: str, C_form: str, no_b0: bool, matmul: bool) -> None:
    o, i, r = size
    product = "matmul" if matmul else "hadamard"
    W0, b0 = torch.randn(o, i).double(), None if no_b0 else torch.randn(o).double()
    A, B = make("A", form, o, i, r, product, torch.float64), make("B", form, o, i, r, "", torch.float64)
    C, E = make("C", C_form, o, i, r, "", torch.float64), torch.randn(o).double()
    D = None if no_b0 else torch.randn(o).double()
    x = torch.randn(3, 2, i).double()
    W, b = reference.weight(W0, [(1.0, A, B, product)]), reference.bias(W0, b0, [(1.0, C, D, E)])
    y = functional.linear(x, W0, b0, A, B, C, D, E, product=product)
    assert close(y, reference.linear(x, W, b), ulps=256)


def test_no_path_is_the_base_itself() -> None:
    W0, b0 = torch.randn(3, 2), torch.randn(3)
    assert functional.weight(W0) is W0
    assert functional.bias(W0, b0) is b0
    assert functional.bias(W0, None) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    # Two shifts of 0.3 units in the last place: each alone is lost, together they round up.
    W0 = torch.ones(1, 1, dtype=dtype)
    small = torch.full((1,), 0.3 * torch.finfo(dtype).eps)
    assert functional.weight(W0, A=small) == W0
    assert functional.weight(W0, A=small, B=small) > W0
    b = functional.bias(W0, W0[0], D=small, E=small)
    assert b is not None
    assert b > W0[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_is_not_rounded_before_it_is_added(dtype: torch.dtype) -> None:
    # A little more than half a unit: as it is, it rounds up; rounded first, it is exactly half, and rounds to even.
    W0 = torch.ones(1, 1, dtype=dtype)
    more_than_half = torch.full((1,), 0.5 * torch.finfo(dtype).eps * (1 + 2**-12))
    assert functional.weight(W0, B=more_than_half) > W0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_paths_in_half_precision_are_summed_in_single_precision(dtype: torch.dtype) -> None:
    # 3 * 0.34 takes more digits than half precision has; what is left of them decides how W0 + W0 A + B rounds.
    W0, b0 = torch.randn(64, 64).to(dtype), torch.randn(64).to(dtype)
    A, B, D, E = (torch.randn(*shape).to(dtype) for shape in ((64, 1), (64, 64), (64,), (64,)))
    wide = W0.float() + (W0.float() * A.float() + B.float())
    assert torch.equal(functional.weight(W0, A, B), wide.to(dtype))
    b = functional.bias(W0, b0, D=D, E=E)
    assert b is not None
    assert torch.equal(b, (b0.float() + (b0.float() * D.float() + E.float())).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_in_half_precision_are_scaled_in_single_precision(dtype: torch.dtype) -> None:
    value, right, scale = torch.randn(64, 1).to(dtype), torch.randn(1, 4).to(dtype), torch.tensor(0.3)
    one = functional.Factors(value, scale).scaled()
    left, _ = functional.Factors((value, right), scale).scaled()
    assert torch.equal(one, value.float() * 0.3)
    assert torch.equal(left, value.float() * 0.3)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_product_is_computed_in_the_wider_of_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    left, right = torch.randn(3, 5, dtype=dtypes[0]), torch.randn(5, 4, dtype=dtypes[1])
    assert torch.equal(multiply(left, right), left.double() @ right.double())


def test_a_layer_is_elementwise_where_no_product_is_named() -> None:
    x, W0, A = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(functional.linear(x, W0, A=A), x @ (W0 + W0 * A).T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    W0, b0 = torch.randn(8, 6).to(dtype), torch.randn(8).to(dtype)
    A, B, C = (torch.randn(8, 2), torch.randn(2, 6)), (torch.randn(8, 2), torch.randn(2, 6)), torch.randn(6, 1)
    W, b = functional.weight(W0, A, B), functional.bias(W0, b0, C)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(functional.weight(W0, A, B), W)
        assert torch.equal(functional.bias(W0, b0, C), b)


def weight_arguments(A_form: str, B_form: str, product: str) -> list[Tensor]:
    A, B = make("A", A_form, 4, 3, 2, product, torch.float64), make("B", B_form, 4, 3, 2, "", torch.float64)
    flat = [t for path in (A, B) if path is not None for t in (path if isinstance(path, tuple) else (path,))]
    return [torch.randn(4, 3, dtype=torch.float64), *flat]


def call_weight(A_form: str, B_form: str, product: str, W0: Tensor, *flat: Tensor) -> Tensor:
    left = list(flat)
    paths = [
        None if form == "none" else (left.pop(0), left.pop(0)) if form == "lora" else left.pop(0)
        for form in (A_form, B_form)
    ]
    return functional.weight(W0, *paths, product=product)


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("B_form", WEIGHT_FORMS)
@pytest.mark.parametrize("A_form", WEIGHT_FORMS)
def test_weight_derivatives(A_form: str, B_form: str, product: str) -> None:
    def function(*tensors: Tensor) -> Tensor:
        return call_weight(A_form, B_form, product, *tensors)

    arguments = weight_arguments(A_form, B_form, product)
    for tensor in arguments:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)
    reverse = torch.func.jacrev(function, tuple(range(len(arguments))))(*arguments)
    tangents = tuple(torch.randn_like(t) for t in arguments)
    forward = torch.func.jvp(function, tuple(arguments), tangents)[1]
    along = sum(
        torch.einsum("oi...,...->oi", J.flatten(2), t.flatten()) for J, t in zip(reverse, tangents, strict=True)
    )
    torch.testing.assert_close(forward, along)


@pytest.mark.parametrize("E_form", BIAS_FORMS)
@pytest.mark.parametrize("D_form", BIAS_FORMS)
@pytest.mark.parametrize("C_form", PROMPT_FORMS)
def test_bias_derivatives(C_form: str, D_form: str, E_form: str) -> None:
    made = [make(p, f, 4, 3, 2, "", torch.float64) for p, f in (("C", C_form), ("D", D_form), ("E", E_form))]
    flat = [t for path in made if path is not None for t in (path if isinstance(path, tuple) else (path,))]

    def function(W0: Tensor, b0: Tensor, *tensors: Tensor) -> Tensor:
        left = list(tensors)
        C = None if C_form == "none" else (left.pop(0), left.pop(0)) if C_form == "lora" else left.pop(0)
        D, E = (None if form == "none" else left.pop(0) for form in (D_form, E_form))
        b = functional.bias(W0, b0, C, D, E)
        assert b is not None
        return b

    base = [torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    arguments = [tensor.requires_grad_() for tensor in (*base, *flat)]
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)
    tangents = tuple(torch.randn_like(t) for t in arguments)
    forward = torch.func.jvp(function, tuple(arguments), tangents)[1]
    reverse = torch.func.jacrev(function, tuple(range(len(arguments))))(*arguments)
    along = sum(J.flatten(1) @ t.flatten() for J, t in zip(reverse, tangents, strict=True))
    torch.testing.assert_close(forward, along)


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_vmap_over_inputs_and_over_factors(product: Any) -> None:
    W0, b0, x = torch.randn(4, 3), torch.randn(4), torch.randn(5, 3)
    rows = 4 if product == "hadamard" else 3
    A = torch.randn(5, rows, 2), torch.randn(5, 2, 3)

    def one(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return functional.linear(x, W0, b0, A=(left, right), E=torch.ones(1), product=product)

    batched = torch.func.vmap(one)(x, *A)
    alone = torch.stack([one(x[k], A[0][k], A[1][k]) for k in range(5)])
    torch.testing.assert_close(batched, alone)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"A": torch.ones(3)}, "Path A must have the shape .* found \\(3,\\)"),
        ({"A": torch.ones(1, 3)}, "Path A"),
        ({"A": torch.ones(4, 1), "product": "matmul"}, "Path A"),
        ({"B": (torch.ones(4, 2), torch.ones(3, 3))}, "Path B .* pair"),
        ({"B": (torch.ones(3, 2), torch.ones(2, 3))}, "Path B .* pair"),
        ({"B": (torch.ones(4), torch.ones(3))}, "Path B .* pair"),
        ({"B": (torch.ones(4, 3), torch.ones(3))}, "Path B .* pair"),
        ({"B": (torch.ones(4), torch.ones(1, 3))}, "Path B .* pair"),
        ({"A": (torch.ones(4, 2), torch.ones(2, 3, 1))}, "Path A .* pair"),
        ({"A": (torch.ones(4, 2), torch.ones(2, 3)), "product": "matmul"}, "Path A .* pair"),
        ({"B": torch.ones(1, 3)}, "Path B must have the shape .* found \\(1, 3\\)"),
        ({"B": torch.ones(4)}, "Path B"),
        ({"B": torch.ones(())}, "Path B"),
        ({"B": torch.ones(1, 1)}, "Path B"),
        ({"A": torch.ones(1, 1)}, "Path A"),
        ({"B": (torch.ones(4, 2), torch.ones(3))}, "Path B .* pair"),
        ({"B": (torch.ones(4), torch.ones(2, 3))}, "Path B .* pair"),
        (
            {"B": (torch.ones(4, 2), torch.ones(1, 3))},
            r"^Path B must have the shape \(4, 1\) or \(1,\) or \(4, 3\), or a pair of \(4, r\) and \(r, 3\); "
            r"found the pair \(\(4, 2\), \(1, 3\)\)\.$",
        ),
        ({"product": "tensor"}, "product must be one of 'hadamard', 'matmul'; found 'tensor'"),
    ],
)
def test_weight_refuses_what_would_broadcast_wrongly(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        functional.weight(torch.ones(4, 3), **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"C": torch.ones(4, 1)}, "Path C"),
        ({"C": torch.ones(3)}, "Path C"),
        ({"C": (torch.ones(3, 2), torch.ones(2))}, "Path C .* pair"),
        ({"C": (torch.ones(4, 2), torch.ones(2, 1))}, "Path C .* pair"),
        ({"E": torch.ones(())}, "Path E"),
        ({"E": torch.ones(4, 4)}, "Path E"),
        ({"D": torch.ones(3)}, "Path D"),
        ({"D": (torch.ones(4, 1), torch.ones(1, 1))}, "Path D .* pair"),
        ({"E": torch.ones(4, 1)}, "Path E"),
        ({"D": torch.ones(4), "b0": None}, r"^D scales the bias; found b0=None\. .* zeros\.$"),
    ],
)
def test_bias_refuses_what_would_broadcast_wrongly(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        functional.bias(torch.ones(4, 3), **{"b0": torch.ones(4), **arguments})


def test_a_weight_that_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"W0 must be a matrix \(out, in\); found a tensor of shape \(3,\)"):
        functional.weight(torch.ones(3))
