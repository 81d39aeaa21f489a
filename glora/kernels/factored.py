"""Layers whose forms need no W': `y = (1 + a) * (x W0^T) + (x R_B^T) L_B^T + b'`, and the same from copies of x."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from glora.functional import Factors, WeightFactors, multiply, working_dtype

# torch.compile guards on the table of the types that einops has met: fill it before anything is compiled.
for _kind in (torch.zeros(1, 1), torch.nn.Parameter(torch.zeros(1, 1))):
    rearrange(_kind, "i 1 -> i")


def linear(
    x: Tensor,
    W0: Tensor,
    bias: Tensor | None,
    adapters: Sequence[WeightFactors],
    dtype: torch.dtype,
    *,
    expanded: bool = False,
) -> Tensor:
    """`x W'^T + bias` without W' (Note [Kernels]).

    Args:
        x: `(..., in)`.
        W0: frozen weight, `(out, in)`.
        bias: the adapted bias, `(out,)`, or None.
        adapters: the adapters' paths; a low-rank elementwise A only with `expanded`.
        dtype: that of the product with W0 and of the result.
        expanded: send rescaled copies of x through W0 for such an A.

    Returns:
        `(..., out)` in `dtype`.
    """
    x = x.to(dtype)
    scales, inputs, shifts = sort_paths(W0, adapters, dtype)
    half = dtype in (torch.bfloat16, torch.float16)
    if inputs and not scales and not half:
        x_scaled, inputs = x + scaled_inputs(x, inputs), []
    else:  # in half precision a small change of the input would be rounded away
        x_scaled = x
    if not (scales or inputs or shifts):
        return F.linear(x_scaled, W0, bias)
    y, terms = (_expand if expanded else _scale_outputs)(x_scaled, W0, scales)
    if inputs:
        terms.append(F.linear(scaled_inputs(x, inputs), W0))
    terms += [_shift(x, path) for path in shifts]
    # Term by term in float32 at least, and rounded once: a small update beside a large y.
    total = reduce(add, terms, _wide(y))
    return (total if bias is None else total + bias).to(dtype)


def sort_paths(
    W0: Tensor, adapters: Sequence[WeightFactors], dtype: torch.dtype
) -> tuple[list[Factors], list[Factors], list[Factors]]:
    """The paths by what they do: scale W0 entry by entry, scale the input's channels, or add to W0.

    A constant scales W0 alike under either product. A low-rank A of a matrix product adds `(W0 L) R`: W0 L is thin.
    """
    scales: list[Factors] = []
    inputs: list[Factors] = []
    shifts: list[Factors] = []
    for A, B, product in adapters:
        if A is not None:
            if isinstance(A.tensors, tuple) and product == "matmul":
                left, right = A.scaled()
                size = A.scale.new_ones(())
                if dtype == torch.float16:  # whose range `W0 L` may leave where `W0 L R` does not
                    largest = left.detach().abs().amax()
                    size = torch.where(largest > 0, largest, 1.0)
                shifts.append(Factors((W0 @ (left / size).to(W0.dtype), right), size))
            elif isinstance(A.tensors, Tensor) and product == "matmul" and A.tensors.ndim > 1:
                inputs.append(A)
            else:
                scales.append(A)
        if B is not None:
            shifts.append(B)
    return scales, inputs, shifts


def scaled_inputs(x: Tensor, paths: Sequence[Factors]) -> Tensor:
    """What paths that scale the input's channels add to it, `(..., in)`."""
    total = reduce(add, [_scaled_tensor(path) for path in paths])
    return (x * total.squeeze(0)).to(x.dtype)


def _scale_outputs(x: Tensor, W0: Tensor, scales: Sequence[Factors]) -> tuple[Tensor, list[Tensor]]:
    if not scales:
        return F.linear(x, W0), []
    if x.dtype in (torch.bfloat16, torch.float16):
        # y is rounded to steps of up to 0.8%, and (1 + a) y with a small a would round back to y, or a whole step away,
        # for all tokens alike. The sum of two halves of the product lies between the steps: the roundings cancel.
        half = x.shape[-1] // 2
        y = _wide(F.linear(x[..., :half], W0[:, :half])) + F.linear(x[..., half:], W0[:, half:])
    else:
        y = F.linear(x, W0)
    return y, [y * reduce(add, map(_output_scale, scales))]


def _expand(x: Tensor, W0: Tensor, scales: Sequence[Factors]) -> tuple[Tensor, list[Tensor]]:
    pairs = [path.scaled() for path in scales if isinstance(path.tensors, tuple)]
    left, right = torch.cat([pair[0] for pair in pairs], 1), torch.cat([pair[1] for pair in pairs], 0)
    copies = F.linear(torch.cat([x.unsqueeze(-2), x.unsqueeze(-2) * right.to(x.dtype)], -2), W0)  # (..., 1 + r, out)
    y, copied = copies[..., 0, :], copies[..., 1:, :]
    vectors = [path for path in scales if isinstance(path.tensors, Tensor)]
    terms = [y * reduce(add, map(_output_scale, vectors))] if vectors else []
    return y, [einsum(_wide(copied), left, "... r o, o r -> ... o"), *terms]


def _output_scale(path: Factors) -> Tensor:
    """A vector `(out, 1)` or constant `(1,)` as it meets outputs `(..., out)`."""
    return rearrange(_scaled_tensor(path), "o ... -> (o ...)")


def _shift(x: Tensor, path: Factors) -> Tensor:
    """What a path B adds to the output, `x B^T`."""
    if isinstance(path.tensors, Tensor):
        return _wide(x).sum(-1, keepdim=True) * _output_scale(path)
    left, right = path.scaled()
    if x.dtype == torch.float16:  # a thin product may overflow where W' does not
        return multiply(multiply(x, right.mT), left.mT)
    return F.linear(F.linear(x, right.to(x.dtype)), left.to(x.dtype))


def _scaled_tensor(path: Factors) -> Tensor:
    tensor = path.scaled()
    assert isinstance(tensor, Tensor)
    return tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(working_dtype(tensor))
