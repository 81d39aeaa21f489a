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
from glora.kernels import frozen
from glora.kernels.factored import join_factors, scaled_inputs, sort_paths
from glora.kernels.frozen import blocks
from glora.quantised import dense, rows

# Note [Blocks]
# The gradient of a factor of an elementwise A needs dW' = g^T x entry by entry, so that A cannot be taken apart into
# thin products of activations as B can. But neither W' nor dW' need be whole: a block of rows of either depends on that
# block of rows of W0 alone. Made anew in the backward pass, a block of W' costs r/N of a product, and saves its memory.
# What is saved are the raw factors, which are parameters, and not their scaled and joined copies, which are not.
#
# In half precision (and under half autocast) rounding W' would lose small updates: the update goes through a product of
# its own, beside x W0^T, and is added in float32. That is the fourth product of a step; the backward pass uses W'.
#
# `frozen.blocks` gives them. At 2048 x 2048, 1024 tokens, float32, on two cores, a step was timed with blocks of 2^19,
# 2^20, 2^21 entries: 1.19, 1.12, 1.09 of a trained nn.Linear's. In small blocks the product for dW' suffers (it packs
# all of x for each of them); above there is little to gain, and memory to lose.


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
        # A clone of the scale: an adapter's A and B share it, and dynamo takes no tensor twice.
        tensors += [left, right, path.scale.clone()]
    apply: Any = _Blocked.apply  # pyright: ignore - torch leaves it untyped
    flat = cast("Tensor", apply(x.reshape(-1, W0.shape[1]), W0, bias, dtype, len(A), *tensors))
    y = flat.reshape(*x.shape[:-1], W0.shape[0])
    return (y + frozen.linear(scaled_inputs(x, inputs), W0)).to(dtype) if inputs else y


class _Blocked(torch.autograd.Function):
    # `tensors` are left (or a vector or constant), right (or None) and scale of each path, the `count` paths A first.
    @staticmethod
    def forward(
        x: Tensor, W0: Tensor, bias: Tensor | None, dtype: torch.dtype, count: int, *tensors: Tensor | None
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            tokens = x.to(dtype)
            A, B = _fold(W0, count, tensors)
            y = tokens.new_empty(tokens.shape[0], W0.shape[0])
            for block in blocks(W0):
                W = rows(W0, block)
                if dtype in (torch.bfloat16, torch.float16):
                    beside = (tokens @ W.to(dtype).T).float() + tokens @ _update(W, A, B, block, one=False).to(dtype).T
                    y[:, block] = beside if bias is None else beside + bias[block]
                elif bias is None:
                    torch.mm(tokens, _weight(W, A, B, block).to(dtype).T, out=y[:, block])
                else:
                    torch.addmm(bias[block].to(dtype), tokens, _weight(W, A, B, block).to(dtype).T, out=y[:, block])
            return y

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
        with torch.autocast(W0.device.type, enabled=False):
            g = grads[0].to(ctx.dtype)
            tokens = None if x is None else x.to(ctx.dtype)
            A, B = _fold(W0, ctx.count, tensors)
            dA, dB = ([torch.zeros_like(factor) for factor in pair] for pair in (A, B))
            # In half precision the blocks' shares are added up in float32, however many there are.
            wide = functional.working_dtype(g)
            dx = g.new_empty(ctx.x_shape[0], dtype=wide) if ctx.needs_input_grad[0] else None
            for block in blocks(W0):
                W = rows(W0, block)
                if dx is not None:
                    _add_product(dx, g[:, block], _weight(W, A, B, block).to(ctx.dtype), first=block.start == 0)
                if tokens is not None:
                    dW = (g[:, block].T @ tokens).to(A[0].dtype)
                    if B[0].shape[1]:
                        dB[0][block] = dW @ B[1].T
                        dB[1].addmm_(B[0][block].T, dW)
                    dW = dW.mul_(W)
                    dA[0][block] = dW @ A[1].T
                    dA[1].addmm_(A[0][block].T, dW)
            dbias = g.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
            dfactors = _unfold(ctx.count, tensors, dA, dB) if tokens is not None else [None] * len(tensors)
        return (None if dx is None else dx.to(ctx.x_shape[1]), None, dbias, None, None, *dfactors)


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
        A, B = _fold(W0, ctx.count, tensors)
        shift = (B[0], B[1]) if B[0].shape[1] else None
        W = cast("Tensor", functional.weight_update(dense(W0), (A[0], A[1]), shift)).to(W0.dtype)
        y = x.to(ctx.dtype) @ W.to(ctx.dtype).T
        wanted = [i for i in (0, *range(5, len(ctx.needs_input_grad))) if ctx.needs_input_grad[i]]
        sources = [x if i == 0 else tensors[i - 5] for i in wanted]
        grads = torch.autograd.grad(y, sources, g.to(ctx.dtype), create_graph=again) if wanted else ()
        found = dict(zip(wanted, grads, strict=True))
        dbias = g.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return (found.get(0), None, dbias, None, None, *(found.get(i) for i in range(5, len(ctx.needs_input_grad))))


def _update(W: Tensor, A: list[Tensor], B: list[Tensor], block: slice, *, one: bool) -> Tensor:
    """`W * A + B` of a block, or with `one` W' itself, `W * (1 + A) + B`, unrounded: three passes over one buffer.

    A's last component is the one, so that `1 + A` is a single product.
    """
    rank = A[0].shape[1] - (not one)
    update = (A[0][block, :rank] @ A[1][:rank]).mul_(W)
    return update.addmm_(B[0][block], B[1]) if B[0].shape[1] else update


def _weight(W: Tensor, A: list[Tensor], B: list[Tensor], block: slice) -> Tensor:
    """A block of W', in W0's dtype, rounded once."""
    return _update(W, A, B, block, one=True).to(W.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Add `left @ right` to a total that may be wider; the first one overwrites memory that is not initialised."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=0 if first else 1)
    elif first:
        total.copy_(left @ right)
    else:
        total.add_(left @ right)


def _fold(W0: Tensor, count: int, tensors: Sequence[Any]) -> list[list[Tensor]]:
    """All paths A as one pair, and all paths B: low-rank factors side by side, a vector as a component of rank one.

    The last component of A is 1, which keeps W0 itself.
    """
    out_features, in_features = W0.shape
    wide = functional.working_dtype(W0, *tensors[::3])
    device = W0.device
    column = torch.ones(out_features, 1, dtype=wide, device=device)
    row = torch.ones(1, in_features, dtype=wide, device=device)
    sides: list[list[list[Tensor]]] = [[[], []], [[], []]]
    for number in range(len(tensors) // 3):
        left, right, scale = tensors[3 * number : 3 * number + 3]
        lefts, rights = sides[number >= count]
        columns = left.to(wide) * scale
        lefts.append(columns if right is not None else columns.reshape(-1, 1).expand(out_features, 1))
        rights.append(right.to(wide) if right is not None else row)
    sides[0][0].append(column)
    sides[0][1].append(row)
    return [[_join(lefts, column, 1), _join(rights, row, 0)] for lefts, rights in sides]


def _join(factors: list[Tensor], like: Tensor, dim: int) -> Tensor:
    return join_factors(factors, dim) if factors else like.narrow(dim, 0, 0)


def _unfold(count: int, tensors: Sequence[Any], dA: list[Tensor], dB: list[Tensor]) -> list[Tensor | None]:
    """The gradients of the tensors from those of the two pairs; None for the scales."""
    grads: list[Tensor | None] = []
    at = 0
    for number in range(len(tensors) // 3):
        left, right, scale = tensors[3 * number : 3 * number + 3]
        dleft, dright = dA if number < count else dB
        at = 0 if number == count else at
        rank = 1 if right is None else left.shape[1]
        scaled = dleft[:, at : at + rank] * scale
        if right is None:  # a constant stands in every row
            scaled = (scaled if left.numel() > 1 else scaled.sum(0)).reshape(left.shape)
        grads += [scaled.to(left.dtype), None if right is None else dright[at : at + rank].to(right.dtype), None]
        at += rank
    return grads
