"""Layers whose forms need no W': `y = (1 + a) * (x W0^T) + (x R_B^T) L_B^T + b'`, and the same from copies of x."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import cast

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor
from torch.jit._trace import is_tracing

from glora.functional import Factors, WeightFactors
from glora.kernels import frozen, joined
from glora.kernels.again import in_transform
from glora.precision import multiply, wide, working_dtype
from glora.tensors import is_quantised

# torch.compile guards on the table of the types that einops has met: fill it before anything is compiled.
for _kind in (torch.zeros(1, 1), torch.nn.Parameter(torch.zeros(1, 1))):
    einsum(_kind, "i j -> i")


# Note [In place]
# A pass over the outputs costs a few percent of the product that they come from: it is the number of passes that tells
# one way of writing this from another. So the outputs are computed once and then added to in place, the thin product of
# all paths B by the product itself (`addmm_`). Autograd allows it: what is written over is nobody's saved tensor, since
# neither a product nor a sum keeps its result. Under torch.func's transforms a factor may be batched where the outputs
# are not, and cannot be added to them in place; when compiling it is all one.


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
    rows = x.to(dtype).reshape(-1, W0.shape[1])
    scales, inputs, shifts = sort_paths(W0, adapters, dtype)
    pair = pair_of(shifts, *W0.shape) if shifts else None
    if pair is not None and not (inputs or expanded) and _can_join(W0, pair, scales, dtype):
        left, right = (factor.to(dtype) for factor in pair)
        scale = _output_scale(scales, W0).to(dtype) if scales else None
        y = joined.linear(rows, W0, bias, scale, left, right)
        return y.reshape(*x.shape[:-1], W0.shape[0])
    half, in_place = dtype in (torch.bfloat16, torch.float16), not is_traced()
    if inputs and not scales and not half:
        scaled, inputs = rows * (1 + total_of(inputs).squeeze(0)), []
    else:  # in half precision a small change of the input would be rounded away
        scaled = rows
    if expanded:
        y = _expand(scaled, W0, scales)
    elif scales:
        y = product(scaled, W0, half) * _output_scale(scales, W0)
    else:
        first, bias = (None, bias) if half else (bias, None)
        y = frozen.linear(scaled, W0, first)
    # Term by term in float32 at least, and rounded once: a small update beside a large y.
    for term in (bias, frozen.linear(scaled_inputs(rows, inputs), W0) if inputs else None):
        if term is not None:
            y = y.add_(term) if in_place and y.dtype == working_dtype(y, term) else y + wide(term)
    if pair is not None:
        y = wide(y)
        thin, left = _thin(rows, pair[1]), pair[0].to(y.dtype).T
        y = y.addmm_(thin, left) if in_place else y + multiply(thin, left)
    return y.to(dtype).reshape(*x.shape[:-1], W0.shape[0])


def _can_join(W0: Tensor, pair: tuple[Tensor, Tensor], scales: Sequence[Factors], dtype: torch.dtype) -> bool:
    """Whether this may be one Function (Note [One Function]).

    In bfloat16 its results differ from the others' by roundings: those of a frozen B with and without gradients, too.
    """
    if torch.is_grad_enabled() and not pair[1].requires_grad:
        return False  # it would keep x, which no gradient needs
    if dtype == torch.float16 or (dtype == torch.bfloat16 and scales):
        return False  # `_thin` and `product` say why
    return not (is_quantised(W0) or torch.compiler.is_compiling() or in_transform() or is_tracing())


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
                shifts.append(Factors((frozen.thin_product(W0, left / size), right), size))
            elif isinstance(A.tensors, Tensor) and product == "matmul" and A.tensors.ndim > 1:
                inputs.append(A)
            else:
                scales.append(A)
        if B is not None:
            shifts.append(B)
    return scales, inputs, shifts


def scaled_inputs(x: Tensor, paths: Sequence[Factors]) -> Tensor:
    """What paths that scale the input's channels add to it, `(..., in)`."""
    return (x * total_of(paths).squeeze(0)).to(x.dtype)


def product(x: Tensor, W0: Tensor, half: bool) -> Tensor:
    """`x W0^T`, as it may be scaled: in half precision as a wide sum."""
    if not half:
        return frozen.linear(x, W0)
    # y is rounded to steps of up to 0.8%, and (1 + a) y with a small a would round back to y, or a whole step away, for
    # all tokens alike. The sum of two halves of the product lies between the steps: the roundings cancel.
    if is_quantised(W0):  # whose columns cannot be cut anywhere
        first = x * (torch.arange(x.shape[-1], device=x.device) < x.shape[-1] // 2)
        return wide(frozen.linear(first, W0)) + frozen.linear(x - first, W0)
    middle = x.shape[-1] // 2
    return wide(F.linear(x[..., :middle], W0[:, :middle])) + F.linear(x[..., middle:], W0[:, middle:])


def _output_scale(scales: Sequence[Factors], W0: Tensor) -> Tensor:
    """What the outputs are multiplied by, `(out,)`: 1 and vectors `(out, 1)` and constants `(1,)`."""
    return (1 + total_of(scales).flatten()).expand(W0.shape[0])


def _expand(x: Tensor, W0: Tensor, scales: Sequence[Factors]) -> Tensor:
    pairs = [path.scaled() for path in scales if isinstance(path.tensors, tuple)]
    left, right = torch.cat([pair[0] for pair in pairs], 1), torch.cat([pair[1] for pair in pairs], 0)
    copies = frozen.linear(
        torch.cat([x.unsqueeze(1), x.unsqueeze(1) * right.to(x.dtype)], 1), W0
    )  # (tokens, 1 + r, out)
    y, copied = wide(copies[:, 0]), wide(copies[:, 1:])
    vectors = [path for path in scales if isinstance(path.tensors, Tensor)]
    if vectors:
        y = y * _output_scale(vectors, W0)
    return y + einsum(copied, left, "n r o, o r -> n o")


def _thin(x: Tensor, right: Tensor) -> Tensor:
    """`x right^T`, `(tokens, r)`."""
    if x.dtype == torch.float16:  # it may overflow where W' does not
        return multiply(x, right.T)
    return wide(F.linear(x, right.to(x.dtype)))


def pair_of(paths: Sequence[Factors], out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """The sum of paths as one pair of factors, `(out, r)` and `(r, in)`: side by side, a vector as one of rank one."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for path in paths:
        scaled = path.scaled()
        if isinstance(scaled, Tensor):
            scaled = scaled.reshape(-1, 1).expand(out_features, 1), scaled.new_ones(1, in_features)
        pairs.append(scaled)
    if len(pairs) == 1:  # uncopied
        return pairs[0]
    return torch.cat([left for left, _ in pairs], 1), torch.cat([right for _, right in pairs], 0)


def total_of(paths: Sequence[Factors]) -> Tensor:
    """The sum of vectors or constants."""
    return reduce(add, [cast("Tensor", path.scaled()) for path in paths])


def is_traced() -> bool:
    """Whether a graph is compiled or torch.func transforms (Note [In place])."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()  # pyright: ignore
