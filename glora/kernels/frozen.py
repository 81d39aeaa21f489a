"""The products with a frozen W0, which may be quantised: `x W0^T`, `W0 t`, in blocks of its rows."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from glora.kernels.again import in_transform
from glora.precision import outside_autocast, working_dtype
from glora.tensors import dense, is_all_rows, is_quantised, rows

# A block has about CPU_BLOCK or CUDA_BLOCK entries (Note [Blocks]).
CPU_BLOCK, CUDA_BLOCK = 2**21, 2**24


def row_blocks(W0: Tensor) -> list[slice]:
    """Blocks of rows that together are all of W0's."""
    out_features, in_features = W0.shape
    most = max(1, (CPU_BLOCK if W0.device.type == "cpu" else CUDA_BLOCK) // in_features)
    step = -(-out_features // -(-out_features // most))  # of equal size: a small block costs more than its share
    return [slice(start, min(start + step, out_features)) for start in range(0, out_features, step)]


def linear(x: Tensor, W0: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W0^T + bias`, as `torch.nn.functional.linear` computes it.

    Args:
        x: `(..., in)`.
        W0: `(out, in)`; a quantised one is multiplied by its own kernel (Note [Quantised products]).
        bias: `(out,)` or None.

    Returns:
        `(..., out)`.
    """
    if not is_quantised(W0):
        return F.linear(x, W0, bias)
    if in_transform():
        return F.linear(x, dense(W0).to(x.dtype), bias)
    y = _product(x.reshape(-1, W0.shape[1]), W0, False).reshape(*x.shape[:-1], W0.shape[0])
    return y if bias is None else (y + bias).to(y.dtype)


def thin_product(W0: Tensor, thin: Tensor) -> Tensor:
    """`W0 t`, `(out, r)`, of a matrix t `(in, r)` of few columns."""
    return linear(thin.T, W0).T if is_quantised(W0) else W0 @ thin.to(W0.dtype)


# Note [Quantised products]
# torchao's own `x W0^T` dequantises W0 whole in eager mode, and autograd would keep that copy for the gradient of x: as
# many bytes as the layer had before it was quantised. So its kernel is given a block of rows of W0 at a time, and the
# gradient dequantises a block of rows at a time; what is saved is W0 itself. The backward pass is such a product again,
# and so is that of every order. torch.func's transforms and forward mode would need rules that dynamo cannot trace;
# under them W0 is dequantised whole.
def _product(x: Tensor, W0: Tensor, transposed: bool) -> Tensor:
    """`x W0^T`, or `x W0` with `transposed`."""
    apply: Any = _Product.apply  # pyright: ignore - torch leaves it untyped
    return cast("Tensor", apply(x, W0, transposed))


class _Product(torch.autograd.Function):
    generate_vmap_rule = True  # for `is_grads_batched`

    @staticmethod
    def forward(x: Tensor, W0: Tensor, transposed: bool) -> Tensor:
        with outside_autocast(x):
            if transposed:
                # In half precision the blocks' shares are added up in float32, however many there are.
                shares = [(x[:, block] @ rows(W0, block).to(x.dtype)).to(working_dtype(x)) for block in row_blocks(W0)]
                return reduce(add, shares).to(x.dtype)
            if x.dtype == W0.dtype:
                parts = [F.linear(x, W0 if is_all_rows(W0, block) else W0[block]) for block in row_blocks(W0)]
            else:  # not every kernel takes this
                parts = [F.linear(x, rows(W0, block).to(x.dtype)) for block in row_blocks(W0)]
            return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:  # noqa: ARG004 - torch's signature
        _, W0, ctx.transposed = inputs
        ctx.save_for_backward(W0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (W0,) = ctx.saved_tensors
        return _product(grads[0], W0, not ctx.transposed), None, None
