r"""A linear layer with a low-rank elementwise A, without W' ever being whole.

`W' = W0 + W0 * (L_A R_A) + L_B R_B` is made, used and forgotten a block of rows at a time, forward and backward, and
nothing is saved but the input and the factors: three matrix products a step, like a trained layer's (Note [Blocks]).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from glora import functional
from glora.functional import WeightFactors
from glora.kernels import blocks, frozen, opaque
from glora.kernels.factored import scaled_inputs, sort_paths
from glora.quantised import dense, is_quantised


def linear(x: Tensor, W0: Tensor, bias: Tensor | None, adapters: Sequence[WeightFactors], dtype: torch.dtype) -> Tensor:
    """`x W'^T + bias` in blocks of rows of W0, which must not ask for a gradient.

    Args:
        x: `(..., in)`.
        W0: `(out, in)`.
        bias: `(out,)` or None.
        adapters: the adapters' paths.
        dtype: that of the products and of the result: x's, or autocast's.

    Returns:
        `(..., out)` in `dtype`.
    """
    A, inputs, B = sort_paths(W0, adapters, dtype)
    tensors: list[Tensor | None] = []
    for path in (*A, *B):
        left, right = path.tensors if isinstance(path.tensors, tuple) else (path.tensors, None)
        tensors += [left, right, path.scale]
    rows = x.reshape(-1, W0.shape[1])
    if torch.compiler.is_compiling() and not is_quantised(W0):
        flat = opaque.linear(rows, W0, bias, dtype, len(A), tensors)
    else:
        if torch.compiler.is_compiling():  # dynamo takes no tensor twice, and an adapter's A and B share a scale
            tensors[2::3] = [cast("Tensor", scale).clone() for scale in tensors[2::3]]
        apply: Any = _Blocked.apply  # pyright: ignore - torch leaves it untyped
        flat = cast("Tensor", apply(rows, W0, bias, dtype, len(A), *tensors))
    y = flat.reshape(*x.shape[:-1], W0.shape[0])
    return (y + frozen.linear(scaled_inputs(x, inputs), W0)).to(dtype) if inputs else y


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, W0: Tensor, bias: Tensor | None, dtype: torch.dtype, count: int, *tensors: Tensor | None
    ) -> Tensor:
        return blocks.forward(x, W0, bias, dtype, count, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:  # noqa: ARG004 - torch's signature
        x, W0, bias, ctx.dtype, ctx.count, *tensors = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        # Frozen factors need no x: it is not kept, and may be written over.
        ctx.x_shape = x.shape, x.dtype
        ctx.save_for_backward(x if any(ctx.needs_input_grad[5:]) else None, W0, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # Under create_graph, and under vmap, which `is_grads_batched` runs in its older form.
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or _is_batched(grads[0])):
            return _differentiable_backward(ctx, grads[0])
        x, W0, *tensors = ctx.saved_tensors
        dx_dtype = ctx.x_shape[1] if ctx.needs_input_grad[0] else None
        dbias_dtype = ctx.bias_dtype if ctx.needs_input_grad[2] else None
        dx, dbias, dfactors = blocks.backward(grads[0], x, W0, ctx.dtype, ctx.count, tensors, dx_dtype, dbias_dtype)
        return (dx, None, dbias, None, None, *dfactors)


def _is_batched(tensor: Tensor) -> bool:
    functorch: Any = torch._C._functorch  # pyright: ignore - torch leaves it untyped
    return functorch.is_legacy_batchedtensor(tensor) or torch._C._are_functorch_transforms_active()  # pyright: ignore


def _differentiable_backward(ctx: Any, g: Tensor) -> Any:
    """The same gradients through a whole W', in operations that autograd can differentiate again and vmap can map."""
    again = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(g.device.type, enabled=False):
        x, W0, *tensors = ctx.saved_tensors
        if x is None:  # the gradient of x does not depend on x
            x = g.new_zeros(ctx.x_shape[0], dtype=ctx.x_shape[1], requires_grad=True)
        # Aliases: x may itself come from a factor, through an earlier layer, and that path is not this function's.
        aliases: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in (x, *tensors)]
        x, *tensors = aliases
        A, B = blocks.fold(W0, ctx.count, tensors)
        shift = (B[0], B[1]) if B[0].shape[1] else None
        W = cast("Tensor", functional.weight_update(dense(W0), (A[0], A[1]), shift)).to(W0.dtype)
        y = x.to(ctx.dtype) @ W.to(ctx.dtype).T
        wanted = [i for i in (0, *range(5, len(ctx.needs_input_grad))) if ctx.needs_input_grad[i]]
        sources = [x if i == 0 else tensors[i - 5] for i in wanted]
        grads = torch.autograd.grad(y, sources, g.to(ctx.dtype), create_graph=again) if wanted else ()
        found = dict(zip(wanted, grads, strict=True))
        dbias = g.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return (found.get(0), None, dbias, None, None, *(found.get(i) for i in range(5, len(ctx.needs_input_grad))))
