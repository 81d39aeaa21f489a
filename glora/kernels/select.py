"""The cheapest way through an adapted nn.Linear, and the choice of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glora import functional
from glora.functional import WeightFactors
from glora.kernels import blockwise, factored, samplewise
from glora.kernels.terms import terms_of
from glora.precision import in_autocast
from glora.tensors import dense, is_quantised
from glora.torch_internals import in_transform, is_traced, is_tracing

Kernel: TypeAlias = Literal["dense", "factored", "blockwise", "expanded"]

# Note [Kernels]
# One unit is the product of N tokens with W0. A frozen layer's training step costs 2 (forward, gradient of the input).
#
# - factored: every form but one needs no W': y = (1 + a) * (x W0^T) + (x R^T) L^T + b'. A low-rank A of a matrix
#   product counts as a B with the left factor W0 L_A. 2 units and thin products.
# - blockwise: the one form is an elementwise low-rank A. 3 units, and nothing is saved (Note [Blocks]).
# - expanded: without gradients and for a handful of tokens, that A too needs no W'. With A = sum_k l_k r_k^T,
#   (W0 * A) x = sum_k l_k * (W0 (r_k * x)): r + 1 rescaled copies of x go through W0 in one product. It reads W0 once
#   and writes nothing of W0's size; making W' reads and writes it several times. It pays while there are few copies
#   in all, up to EXPANDED_ROWS: by the clock (widths 1024 to 4096, float32) it won with 9 to 36 of them, and lost or
#   drew from 63 on. Not in float16, where a rescaled copy may overflow where W' does not.
# - dense: W' as `layer.weight` gives it, for what the others do not cover: a W0 that trains or is no plain tensor, and
#   nested tensors. In place of blockwise also under torch.func's transforms and forward-mode derivatives, for which a
#   Function would need rules; under torch.jit.trace (and so `torch.onnx.export(dynamo=False)`), which loses writes to a
#   block without a word; and under torch.export, whose graph would need an operator of glora's (Note [Opaque]).
EXPANDED_ROWS = 48


def linear(x: Tensor, W0: Tensor, bias: Tensor | None, adapters: Sequence[WeightFactors]) -> Tensor:
    """`x W'^T + bias`, with `W' = W0 + sum_i (W0 * A_i + B_i)`, by the cheapest kernel.

    Args:
        x: `(..., in)`.
        W0: frozen weight, `(out, in)`.
        bias: the adapted bias, `(out,)`, or None.
        adapters: the paths of the adapters that act.

    Returns:
        `(..., out)` in the dtype of `torch.nn.functional.linear`.

    Raises:
        RuntimeError: what `torch.nn.functional.linear` raises for a wrong input.
    """
    if x.is_nested:  # before its shape is asked for, which not every nested tensor has
        return _dense(x, W0, bias, adapters)
    dtype = result_dtype(x, W0)
    if dtype is None or x.shape[-1] != W0.shape[1] or not adapters:
        return F.linear(x, W0, bias)  # the base layer; or it raises as nn.Linear does
    kernel = choose(x, W0, adapters)
    if kernel == "dense":
        return _dense(x, W0, bias, adapters)
    rows = x if x.ndim == 2 else x.reshape(-1, W0.shape[1])
    run = blockwise.linear if kernel == "blockwise" else factored.linear
    y = run(rows, W0, bias, terms_of(W0, adapters), dtype)
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], W0.shape[0])


def lone_lora(x: Tensor, W0: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`x (W0 + left right)^T + bias` of plain tensors of one dtype, not a narrow one (Note [At a glance])."""
    y = factored.fused(x if x.ndim == 2 else x.reshape(-1, W0.shape[1]), W0, bias, None, left, right)
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], W0.shape[0])


def needing_a_call(x: Tensor, W0: Tensor, groups: Sequence[Sequence[WeightFactors]]) -> list[int] | None:
    """The numbers of the groups of adapters that need a W', where samples of the others can go through W0 together.

    None where no two can, or do not gain by it (Note [One product for all samples]).
    """
    if x.is_nested or is_quantised(W0) or result_dtype(x, W0) is None or x.shape[-1] != W0.shape[1] or is_traced():
        return None
    kernels = [choose(x, W0, adapters) for adapters in groups]
    apart = [number for number, kernel in enumerate(kernels) if kernel != "factored"]
    many = x.numel() // max(1, x.shape[-1]) > samplewise.SPLIT
    return None if "dense" in kernels or len(kernels) - len(apart) < 2 or (apart and many) else apart


def linear_per_sample(
    x: Tensor,
    W0: Tensor,
    biases: Sequence[Tensor | None],
    groups: Sequence[Sequence[WeightFactors]],
    owner: Tensor,
    apart: Sequence[int],
) -> Tensor:
    """`linear` with other adapters for each sample.

    Args:
        x: `(samples, ..., in)`, or `(samples * rows, in)`, one sample's rows after the other's.
        W0: frozen weight, `(out, in)`.
        biases: for each group the adapted bias, `(out,)`, or None.
        groups: for each group the paths of the adapters that act.
        owner: `(samples,)`, the number of each sample's group.
        apart: the groups that need a call of their own, by `needing_a_call`.

    Returns:
        As `linear`.
    """
    rows, dtype = x.reshape(len(owner), -1, W0.shape[1]), cast("torch.dtype", result_dtype(x, W0))
    terms = [terms_of(W0, () if number in apart else adapters) for number, adapters in enumerate(groups)]
    if apart:
        own = [(owner == number).nonzero().flatten() for number in apart]
        rest = torch.isin(owner, torch.tensor(apart), invert=True).nonzero().flatten()
        parts = [linear(rows[these], W0, biases[n], groups[n]) for n, these in zip(apart, own, strict=True)]
        parts.append(samplewise.linear(rows[rest], W0, biases, terms, owner[rest].to(x.device), dtype))
        y = torch.cat(parts)[torch.cat([*own, rest]).argsort()]
    else:
        y = samplewise.linear(rows, W0, biases, terms, owner.to(x.device), dtype)
    return y.reshape(*x.shape[:-1], W0.shape[0])


def choose(x: Tensor, W0: Tensor, adapters: Sequence[WeightFactors]) -> Kernel:
    """The kernel for these paths and this input (Note [Kernels])."""
    if W0.requires_grad or not (type(W0) in (nn.Parameter, Tensor) or is_quantised(W0)):
        return "dense"
    rank = 0  # of all elementwise A together
    for A, _, product in adapters:
        if A is not None and isinstance(A.tensors, tuple) and product == "hadamard":
            rank += A.tensors[0].shape[1]
    if not rank:
        return "factored"
    no_operator = torch.compiler.is_compiling() and is_quantised(W0)  # Note [Opaque]
    if in_transform() or is_tracing() or torch.compiler.is_exporting() or (no_operator and not torch.is_grad_enabled()):
        return "dense"
    if torch.is_grad_enabled() or result_dtype(x, W0) == torch.float16:
        return "blockwise"
    tokens = x.numel() // max(1, x.shape[-1])
    return "expanded" if tokens * (rank + 1) <= EXPANDED_ROWS else "blockwise"


def _dense(x: Tensor, W0: Tensor, bias: Tensor | None, adapters: Sequence[WeightFactors]) -> Tensor:
    weight = functional.adapted_weight(dense(W0), adapters)
    if is_quantised(W0):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight, bias)


def result_dtype(x: Tensor, W0: Tensor) -> torch.dtype | None:
    """The dtype of `F.linear(x, W0)`; None where it raises, since theirs differ."""
    dtypes = x.dtype, W0.dtype
    if in_autocast(x):
        half = torch.get_autocast_dtype(x.device.type)  # for every floating dtype but float64
        dtypes = tuple(half if t.is_floating_point() and t.dtype != torch.float64 else t.dtype for t in (x, W0))
    return dtypes[0] if dtypes[0] == dtypes[1] or is_quantised(W0) else None  # some of which take any x
