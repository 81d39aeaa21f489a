"""Weights that are quantised already: tensors of a subclass that holds its numbers in fewer bits, as torchao's are."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

# Note [Quantised]
# A quantised W0 has the shape and the floating dtype of the weight that it stands for, its own `F.linear`, and
# `dequantize()`. The core asks it for no more than these two and for blocks of its rows, which it must be able to cut
# (`checks` tries it): `kernels/row_blocks` multiplies by it, and wherever numbers are needed, `rows` dequantises a
# block of them. It never asks for a gradient, and stays the very tensor that it is.
#
# W' of such a layer has no quantised form: `layer.weight` is W' of the dequantised W0, a float tensor that is made when
# it is read, and a merge, which would keep it, must be told to (`dequantize=True`).


def is_quantised(tensor: Tensor) -> bool:
    """Whether the tensor holds its numbers in fewer bits and knows how to dequantise them (Note [Quantised])."""
    # torch.Tensor has a `dequantize` for kinds of its own, which this is not about.
    return type(tensor) not in (Tensor, nn.Parameter) and type(tensor).dequantize is not Tensor.dequantize


def dense(tensor: Tensor) -> Tensor:
    """The tensor in floating point; itself where it is not quantised."""
    return cast("Tensor", cast("Any", tensor).dequantize()) if is_quantised(tensor) else tensor


def rows(tensor: Tensor, block: slice) -> Tensor:
    """A block of rows in floating point, of a tensor that may be quantised."""
    return dense(tensor if is_whole(tensor, block) else tensor[block])


def is_whole(tensor: Tensor, block: slice) -> bool:
    """Whether a block of rows is all of them."""
    return (block.start, block.stop) == (0, len(tensor))


def numbers(tensor: Tensor) -> Tensor:
    """The plain tensor whose memory is the tensor's own: one that holds the numbers, where it is quantised."""
    return getattr(tensor, cast("Any", tensor).__tensor_flatten__()[0][0]) if is_quantised(tensor) else tensor
