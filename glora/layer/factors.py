"""One small module for each form of a path; the form `none` has no module.

Each holds raw tensors, and returns them with their scale as `glora.functional.Factors`. It multiplies nothing: the
kernels choose what to multiply first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glora.config import GLoRAConfig
from glora.functional import Factors, is_one
from glora.precision import wide, working_dtype
from glora.tensors import dense, gathered, is_sharded, replicated_like, sharded_like, write_into


class LowRank(nn.Module):
    """`left @ right`, of rank r at most, times `scaling`, and times `balance` where there is one.

    Args:
        left: (..., rows, r).
        right: (..., r, columns).
        config: gives `alpha / rank` and the rate of rank dropout.
        balance: `(1,)`, or (..., 1, 1) for a batch (Note [Balance]).
    """

    left: Tensor
    right: Tensor
    scaling: float
    dropout: float
    compiled_scaling: nn.Parameter
    balance: Tensor | None

    def __init__(self, left: Tensor, right: Tensor, config: GLoRAConfig, balance: Tensor | None = None) -> None:
        super().__init__()
        # Note [Thousands of modules]
        self._parameters.update(left=nn.Parameter(left), right=nn.Parameter(right))
        if balance is None:
            vars(self)["balance"] = None
        else:
            self._buffers["balance"] = balance
        self.take(config)

    # Note [Scales of compiled graphs]
    # A hot swap changes a scale, and must not change a graph: torch.compile is given it as a Parameter, and not as a
    # number, even where it is 1 (Note [Adapter weights are tensors]). Without torch.compile a number is faster.

    def take(self, config: GLoRAConfig) -> None:
        """Scale, and drop components, as a config says."""
        scaling = torch.tensor(config.scaling, dtype=torch.float64, device="cpu")
        # Note [Thousands of modules]
        vars(self).update(
            scaling=config.scaling,
            dropout=config.rank_dropout,
            compiled_scaling=nn.Parameter(scaling, requires_grad=False),
        )

    # Note [Thousands of modules]
    # An adapted layer has a dozen small modules, and a model has thousands of layers. nn.Module's `__setattr__` looks
    # for parameters, modules and buffers first, and `register_parameter` and `add_module` let an attribute be missed
    # first, which take as long as to make a small tensor. So constructors set plain attributes past the one, and put
    # parameters and modules where the others put them.

    def factors(self, adapter_weight: Tensor, dropout: bool = False) -> Factors:
        """`(left, right)` and the scale of left's columns: one number, or with `dropout` a fresh draw of r numbers."""
        left, right = self.left, self.right
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            scale = adapter_weight * self.compiled_scaling
        else:
            scale = adapter_weight if self.scaling == 1.0 else adapter_weight * self.scaling
        balance = self.balance
        if balance is not None:
            if balance.dtype is not torch.float32 or type(left) is not nn.Parameter:
                # Cast with its layer it is of half precision; beside factors that fully_shard divides it is whole.
                balance = wide(balance) if is_sharded(balance) else replicated_like(left, wide(balance))
            scale = balance if is_one(scale) else scale * balance
        if dropout and self.dropout:
            kept = 1 - self.dropout
            drawn = torch.empty(left.shape[-1], dtype=working_dtype(left), device=left.device).bernoulli_(kept)
            scale = drawn * (scale / kept)  # Note [Rank dropout]
        return Factors((left, right), scale)

    # Note [Rank dropout]
    # Each of the r components is kept with probability 1 - p and then scaled by 1 / (1 - p): the expectation of
    # left @ right is the product without dropout. Only the layer's forward draws, and only in training. `layer.weight`
    # reads as the expectation, so that a merge bakes in nothing that was dropped.

    def reset_parameters(self, size: float | None, balance: Tensor | None = None) -> None:
        """Start at zero with a Kaiming-uniform `right` (None), or with entries of the product of about `size`.

        Inside of `torch.no_grad`, as for the other forms.
        """
        if balance is not None and self.balance is not None:
            write_into(self.balance, balance)
        if size is None:
            self.left.zero_()
            _fill(self.right, _kaiming)
        else:
            each = math.sqrt(size / (self.scaling * math.sqrt(self.left.shape[-1])))
            _draw(self.left, each)
            _draw(self.right, each)
            if self.balance is not None:
                self.left.div_(self.balance)

    def extra_repr(self) -> str:
        """Shapes and scaling, for `print(layer)`."""
        return f"left={tuple(self.left.shape)}, right={tuple(self.right.shape)}, scale={self.scaling:g}"


class Vector(nn.Module):
    """One number a channel; or one for all, `(1,)`, since FSDP refuses to shard a 0-dimensional tensor."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self._parameters["value"] = nn.Parameter(value)  # Note [Thousands of modules]

    def factors(self, adapter_weight: Tensor, dropout: bool = False) -> Factors:  # noqa: ARG002 - no rank, no dropout
        """The value and its scale."""
        return Factors(self.value, adapter_weight)

    def reset_parameters(self, size: float | None) -> None:
        """Start at zero (None), or with entries of about `size`."""
        if size is None:
            self.value.zero_()
        else:
            _draw(self.value, size)

    def extra_repr(self) -> str:
        """The shape, for `print(layer)`."""
        return f"value={tuple(self.value.shape)}"


class FrozenPrompt(nn.Module):
    """The vector W0 C in place of a path C whose W0 is gone (Note [Removal order]); it does not train.

    Args:
        shift: `(out,)`.
        scaling: that of C.
    """

    shift: Tensor

    def __init__(self, shift: Tensor, scaling: float) -> None:
        super().__init__()
        self.register_buffer("shift", shift)
        self.scaling = scaling

    def factors(self, adapter_weight: Tensor, dropout: bool = False) -> Factors:  # noqa: ARG002 - no rank, no dropout
        """The vector and its scale."""
        return Factors(self.shift, adapter_weight if self.scaling == 1.0 else adapter_weight * self.scaling)

    def reset_parameters(self, size: float | None) -> None:  # noqa: ARG002 - without W0 no random C can be drawn
        """Start at zero."""
        self.shift.zero_()

    def extra_repr(self) -> str:
        """The shape, for `print(layer)`."""
        return f"shift={tuple(self.shift.shape)}"


def init_size(path: str, config: GLoRAConfig, weight: Tensor) -> float | None:
    """The size of the path's entries at the start; None for the start that changes nothing.

    A random start moves W' (or b') by about a tenth of W0's norm. With `n = ||W0||` (Frobenius), entries of size s move
    W' by `s n` in A (elementwise), by `s sqrt(in) n` in a random matrix A (matrix product), and by `s sqrt(out in)` in
    B. They move b' by about `s n` in C, `s ||b0||` in D and `s sqrt(out)` in E. The matrices of a batch share one size,
    from their root mean square norm.
    """
    if config.init == "identity" or weight.is_meta:
        return None
    *batch, out_features, in_features = weight.shape
    if path in "ACD":
        mixes_inputs = (path, config.A, config.product) == ("A", "lora", "matmul")
        return 0.1 / math.sqrt(in_features) if mixes_inputs else 0.1
    weight = dense(gathered(weight.detach()))
    norm = wide(weight).square().sum().sqrt().item() / math.sqrt(math.prod(batch))
    norm = norm if norm > 0 else math.sqrt(out_features)  # of zeros: about the norm of nn.Linear's own start
    return 0.1 * norm / math.sqrt(out_features * (in_features if path == "B" else 1))


# Note [Balance]
# Adam moves each number of a factor by about the learning rate eta, whatever the size of its gradient. What a first
# step does to the outputs is thus up to the form (left = 0, right uniform with variance 1 / (3 in) at the start; rms:
# root mean square; entries of one tensor taken as independent):
#
# | path             | moves                 | an output by about                            |
# |------------------|-----------------------|-----------------------------------------------|
# | B lora           | left @ right          | eta sqrt(r / 3) rms(x)                        |
# | A lora           | W0 * (left @ right)   | eta sqrt(r / 3) rms(x) rms(W0)                |
# | A lora, matmul   | W0 @ left @ right     | eta sqrt(r / 3) rms(x) sqrt(in) rms(W0) k     |
# | B vector         | each row alike        | eta sqrt(in) rms(x), where x is of mean 0     |
# | A vector         | W0, row by row        | eta |W0 x|, about eta sqrt(in) rms(W0) rms(x) |
# | A vector, matmul | W0, column by column  | eta sqrt(in) rms(W0) rms(x)                   |
# | C vector         | W0 C                  | eta sqrt(in) rms(W0) k                        |
# | D vector         | b0 * D                | eta |b0|                                      |
# | E vector         | E                     | eta                                           |
#
# k = sqrt(1 + 2 in / (pi out)): a step that goes through W0 aligns with the outputs.
#
# Weights of trained layers have rms(W0) of 0.02 to 0.1: beside B, an elementwise low-rank A stands still. So it is
# divided by rms(W0), and a matrix A by sqrt(in) rms(W0): then a step of A does what a step of B of the same rank does.
# sqrt(in) rms(W0) is about 1 in trained layers, and the vectors are left as they are.
#
# The number is taken when the adapter starts, and is one of its tensors from then on (a buffer: it does not train), in
# every state dict and file: they depend on no base at hand. A start of `right` that is larger by as much needs no
# number, and does the same to the first step; but then `right` itself stands still.


def balance_of(config: GLoRAConfig, weight: Tensor) -> Tensor | None:
    """What A is multiplied by on this frozen weight as a matrix, `(1,)`, or (..., 1, 1) for a batch of matrices.

    It is 1 where rms(W0) is 0 or not finite. None where there is none (Note [Balance]), or W0 is on the meta device.
    """
    if not config.is_balanced or weight.is_meta:
        return None
    weight = dense(gathered(weight.detach()))
    linalg: Any = torch.linalg
    size: Tensor = linalg.vector_norm(weight, dim=(-2, -1), keepdim=True, dtype=working_dtype(weight))
    size = size / math.sqrt(weight.shape[-2] * (1 if config.product == "matmul" else weight.shape[-1]))
    # At most float16's largest: a module may be cast.
    balance = torch.where((size > _SMALLEST) & (size < math.inf), (1 / size).clamp(max=65504), 1.0)
    return balance if weight.ndim > 2 else balance.flatten()


_SMALLEST = 1e-30  # of a size that is not taken for 0: float32 holds what it divides


def _draw(factor: Tensor, size: float) -> None:
    def draw(tensor: Tensor) -> None:
        # No entry is near zero (0.5 to 1.5 of `size`, either sign): even a layer of 1 x 1 changes.
        tensor.uniform_(0.5 * size, 1.5 * size)
        tensor.mul_(torch.empty_like(tensor).bernoulli_(0.5).mul_(2).sub_(1))

    _fill(factor, draw)


def _kaiming(right: Tensor) -> None:
    bound = 1 / math.sqrt(right.shape[-1])  # that of `nn.init.kaiming_uniform_(a=math.sqrt(5))`, nn.Linear's own start
    right.uniform_(-bound, bound)


def _fill(factor: Tensor, fill: Callable[[Tensor], object]) -> None:
    """Fill a factor at random. A sharded one gets its part of one draw: ranks with one seed would draw equal parts."""
    if is_sharded(factor) and not factor.is_meta:
        drawn = torch.empty(factor.shape, dtype=factor.dtype, device=factor.device)
        fill(drawn)
        factor.copy_(sharded_like(factor, drawn, from_first=True))
    else:
        fill(factor)
