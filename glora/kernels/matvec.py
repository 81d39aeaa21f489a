"""The product of a half-precision matrix with a float32 vector, without a float32 copy of the matrix."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from glora.precision import outside_autocast

# Note [No wide copy]
# `W0.float() @ c` makes a float32 copy of W0, and autograd keeps it for the gradient of c: twice W0's bytes in every
# adapted half-precision layer with a path C. Here W0 is widened a block of rows at a time, forward and backward, and W0
# itself is what is saved. The product is linear in both of its factors and each derivative is such a product again, so
# that every order of derivative, forward mode and vmap come out of these few lines.

_ENTRIES = 2**20  # of a block of rows


def wide_matvec(matrix: Tensor, vector: Tensor, *, transposed: bool = False) -> Tensor:
    """`matrix @ vector`, computed and returned in the vector's dtype.

    Args:
        matrix: `(m, n)`, of a narrower dtype.
        vector: `(n,)`, or `(m,)` with `transposed`.
        transposed: multiply by `matrix.T` instead.

    Returns:
        `(m,)`, or `(n,)` with `transposed`.

    Example:
        >>> wide_matvec(torch.ones(2, 3, dtype=torch.bfloat16), torch.tensor([1.0, 2.0, 0.001]))
        tensor([3.0010, 3.0010])
    """
    if torch.compiler.is_compiling():
        return ((matrix.T if transposed else matrix).to(vector.dtype) * vector).sum(1)
    apply: Any = _WideMatvec.apply  # pyright: ignore - torch leaves it untyped
    return cast("Tensor", apply(matrix, vector, transposed))


class _WideMatvec(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, vector: Tensor, transposed: bool) -> Tensor:
        rows = max(1, _ENTRIES // max(1, matrix.shape[1]))
        with outside_autocast(vector):
            if transposed:
                total = vector.new_zeros(matrix.shape[1])
                for block, part in zip(torch.split(matrix, rows), torch.split(vector, rows), strict=True):
                    total = total + block.to(vector.dtype).T @ part
                return total
            return torch.cat([block.to(vector.dtype) @ vector for block in torch.split(matrix, rows)])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:  # noqa: ARG004 - torch's signature
        matrix, vector, ctx.transposed = inputs
        ctx.save_for_backward(matrix, vector)
        ctx.save_for_forward(matrix, vector)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        matrix, vector = ctx.saved_tensors
        rows, columns = (vector, grads[0]) if ctx.transposed else (grads[0], vector)
        dmatrix = torch.outer(rows, columns).to(matrix.dtype) if ctx.needs_input_grad[0] else None
        dvector = wide_matvec(matrix, grads[0], transposed=not ctx.transposed) if ctx.needs_input_grad[1] else None
        return dmatrix, dvector, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        matrix, vector = ctx.saved_tensors
        dmatrix, dvector, _ = tangents
        terms = [
            wide_matvec(m, v, transposed=ctx.transposed)
            for m, v in ((dmatrix, vector), (matrix, dvector))
            if m is not None and v is not None
        ]
        return sum(terms[1:], terms[0])
