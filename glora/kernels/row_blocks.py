"""Products with a frozen W0 that is quantised or of half precision, a block of its rows at a time."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from glora.precision import as_dtype, is_half, outside_autocast, wide
from glora.tensors import dense, is_all_rows, is_quantised, rows
from glora.torch_internals import has_half_units, in_transform, is_mapped, is_tracing

# A block has about CPU_BLOCK or CUDA_BLOCK entries (Note [Blocks]).
CPU_BLOCK, CUDA_BLOCK = 2**21, 2**24

FEW = 16
"""Up to so many tokens a copy of W0 of half precision costs more than a wide product (Note [Late terms])."""


def blocks_of(W0: Tensor, cuts: int = 1) -> list[slice]:
    """Blocks of rows that together are all of W0's; on a CPU smaller by `cuts`."""
    out_features, in_features = W0.shape
    most = max(1, (CPU_BLOCK // cuts if W0.device.type == "cpu" else CUDA_BLOCK) // max(1, in_features))
    if out_features <= most:
        return [slice(0, out_features)]
    step = -(-out_features // -(-out_features // most))  # of equal size: a small block costs more than its share
    return [slice(start, min(start + step, out_features)) for start in range(0, out_features, step)]


def columns(tensor: Tensor, block: slice) -> Tensor:
    """The columns that stand for a block of W0's rows: of outputs and of their gradients."""
    return tensor if (block.start, block.stop) == (0, tensor.shape[1]) else tensor[:, block]


def linear(x: Tensor, W0: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W0^T + bias`, as `torch.nn.functional.linear` computes it.

    Args:
        x: `(..., in)`.
        W0: `(out, in)`; a quantised one is multiplied by its own kernel (Note [Row by row]).
        bias: `(out,)` or None.

    Returns:
        `(..., out)`.
    """
    if not is_quantised(W0):
        return F.linear(x, W0, bias)
    y = multiply(x.reshape(-1, W0.shape[1]), W0).reshape(*x.shape[:-1], W0.shape[0])
    return y if bias is None else (y + bias).to(y.dtype)


# Note [Late terms]
# A product of half precision is rounded to steps of up to 0.8% of itself. What is added after that comes too late: a
# small update is lost beside a large bias, whichever of the two comes first; a bias that takes most of x W0^T away
# leaves its roundings, many times those of nn.Linear; two products that are finite together overflow alone. So whatever
# makes up the outputs is summed in float32, and rounded once, in one of two ways:
#
# - as one product: `[x, z] [W0, V]^T + bias` is `x W0^T + z V^T + bias`, summed where the product is. It copies W0 (a
#   block of it) and x, and the outputs are written once.
# - as a wide product, whose outputs are float32, where the sum is no product (a scale on x W0^T), or for few tokens,
#   for which a copy of W0 would be dear. CUDA has a kernel for it. Elsewhere x and a block of W0 are widened. So they
#   are for any number of tokens where a processor has no units for half precision: torch then multiplies it by loops,
#   which took 4 to 75 times as long as float32 (512 tokens at 384, 1,024 at 768; one thread of a processor with AVX2).
#
# W0 and the bias are rounded first, as autocast rounds nn.Linear's. A quantised W0 alone is multiplied by its own
# kernel, whose outputs are rounded for the base layer too.


def is_better_wide(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether products of these tokens in half precision are rather computed in float32 (Note [Late terms])."""
    return len(x) <= FEW or not has_half_units(x, dtype)


def wide_product(x: Tensor, W0: Tensor) -> Tensor:
    """`x W0^T` of an x of half precision, in float32 (Note [Late terms]).

    Args:
        x: `(..., in)`.
        W0: `(out, in)`, rounded to x's dtype.

    Returns:
        `(..., out)`. Its gradients are computed in float32 too, or on CUDA in x's dtype.
    """
    if in_transform() or is_tracing() or torch.compiler.is_exporting():
        with outside_autocast(x):
            return F.linear(wide(x), wide(as_dtype(dense(W0), x.dtype)))
    tokens = x.reshape(-1, W0.shape[1])
    y = _apply(tokens, W0, False, True) if torch.is_grad_enabled() else widened(tokens, W0)
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], W0.shape[0])


def widened(x: Tensor, W0: Tensor) -> Tensor:
    """`wide_product` without autograd, of an x of two dimensions."""
    with outside_autocast(x):
        if x.is_cuda:
            return torch.mm(x, as_dtype(dense(W0), x.dtype).T, out_dtype=torch.float32)
        dtype, x = x.dtype, wide(x)
        # Smaller blocks: what has just been widened is still in the cache.
        parts = [F.linear(x, wide(as_dtype(rows(W0, block), dtype))) for block in blocks_of(W0, 4)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def side_by_side(W: Tensor, V: Tensor, dtype: torch.dtype) -> Tensor:
    """`[W, V]` in `dtype`, without a copy of either in between; it has no gradient."""
    if W.dtype == V.dtype == dtype:
        return torch.cat([W, V], 1)
    joined = W.new_empty(len(W), W.shape[1] + V.shape[1], dtype=dtype)
    joined[:, : W.shape[1]].copy_(W)  # quicker than `cat` with `out`
    joined[:, W.shape[1] :].copy_(V)
    return joined


def thin_product(W0: Tensor, thin: Tensor) -> Tensor:
    """`W0 t`, `(out, r)`, of a matrix t `(in, r)` of few columns, computed in t's dtype."""
    if W0.dtype == thin.dtype and not is_quantised(W0):
        with outside_autocast(thin):
            return W0 @ thin
    if torch.compiler.is_compiling() and not is_quantised(W0):
        W = W0.to(thin.dtype)  # the compiler fuses this with the sum
        return (W * thin.T).sum(1, keepdim=True) if thin.shape[1] == 1 else W @ thin
    return multiply(thin.T, W0).T


# Note [Row by row]
# torch widens a quantised W0, or one of half precision beside a float32 factor, as a whole, and autograd keeps the wide
# copy for the gradient: more than twice W0's bytes. Here a block of rows is widened at a time, forward and backward,
# and what is saved is W0 itself. The gradient of such a product is such a product again, so that derivatives of every
# order come out of it. torch.func's transforms and forward mode would need rules that dynamo cannot trace; under them
# W0 is widened as a whole.
def multiply(x: Tensor, W0: Tensor, *, transposed: bool = False) -> Tensor:
    """`x W0^T` in x's dtype, or `x W0` with `transposed`; x has two dimensions."""
    if in_transform() or (not torch.compiler.is_compiling() and is_mapped(x)):
        with outside_autocast(x):
            W = dense(W0).to(x.dtype)
            return x @ W if transposed else F.linear(x, W)
    return _apply(x, W0, transposed, False)


def _apply(*arguments: Any) -> Tensor:
    apply: Any = _Product.apply  # pyright: ignore - torch leaves it untyped
    return cast("Tensor", apply(*arguments))


class _Product(torch.autograd.Function):
    # Note [No setup_context].
    @staticmethod
    def forward(ctx: Any, x: Tensor, W0: Tensor, transposed: bool, is_wide: bool) -> Tensor:
        ctx.transposed, ctx.dtype = transposed, x.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, W0)
        if is_wide:
            return widened(x, W0)
        blocks = blocks_of(W0)
        with outside_autocast(x):
            if transposed:
                # In half precision the blocks' shares are added up in float32, however many there are.
                full = wide(x) if is_half(x.dtype) and is_better_wide(x, x.dtype) else x
                shares = [columns(full, block) @ as_dtype(rows(W0, block), full.dtype) for block in blocks]
                return as_dtype(shares[0] if len(shares) == 1 else reduce(add, map(wide, shares)), x.dtype)
            if x.dtype == W0.dtype:
                parts = [F.linear(x, W0 if is_all_rows(W0, block) else W0[block]) for block in blocks]
            else:  # not every quantised kernel takes this
                parts = [F.linear(x, rows(W0, block).to(x.dtype)) for block in blocks]
            if len(parts) > 1:
                return torch.cat(parts, -1)
            # A quantised kernel may return a view: autograd lets no view that was made here be added to in place.
            return parts[0].data if is_quantised(W0) else parts[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, W0), (g,) = ctx.saved_tensors, grads
        if g.is_cuda:  # a wide product's
            g = as_dtype(g, ctx.dtype)
        dx = as_dtype(multiply(g, W0, transposed=not ctx.transposed), ctx.dtype) if ctx.needs_input_grad[0] else None
        left, right = (x, g) if ctx.transposed else (g, x)
        return dx, None if x is None else (left.T @ right).to(W0.dtype), None, None
