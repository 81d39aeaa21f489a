"""Tensors that are no plain ones: quantised weights, and DTensors, of which each rank holds a part."""

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
    return dense(tensor if is_all_rows(tensor, block) else tensor[block])


def is_all_rows(tensor: Tensor, block: slice) -> bool:
    """Whether a block of rows is all of them."""
    return (block.start, block.stop) == (0, len(tensor))


def storage_of(tensor: Tensor) -> Tensor:
    """The plain tensor whose memory is the tensor's own: one that holds the numbers, where it is quantised."""
    return getattr(tensor, cast("Any", tensor).__tensor_flatten__()[0][0]) if is_quantised(tensor) else tensor


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor, of which each rank holds a part."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every rank: a collective, which all ranks call in the same order."""
    return cast("Any", tensor).full_tensor() if is_sharded(tensor) else tensor


def sharded_like(tensor: Tensor, value: Tensor, *, from_first: bool = False) -> Tensor:
    """A whole tensor divided over the ranks as `tensor` is, or itself where that is whole.

    Args:
        tensor: what to divide it like; may be on the meta device.
        value: of the same shape.
        from_first: the first rank's value is taken, which sends it. Else each rank has the same whole value and takes
            its part without asking.
    """
    if not is_sharded(tensor) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = tensor
    source = 0 if from_first else None
    value = value.detach().to(sharded.device_mesh.device_type, sharded.dtype)
    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=source)


def replicated_like(tensor: Tensor, value: Tensor) -> Tensor:
    """A tensor that stands whole on every rank that holds a part of `tensor`, or itself where that is whole."""
    if not is_sharded(tensor):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = cast("Any", tensor).device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def write_into(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    tensor.copy_(sharded_like(tensor, gathered(value)))


# Note [Tensor parallel]
# parallelize_module makes a layer's weights and inputs DTensors, each as its style divides it; adapters are attached
# after it. Their factors are replicated DTensors (they are thin), and W' is computed on DTensors, by the dense kernel:
# torch knows which rank needs what, forward and backward, for every form and style. The other order fails in torch,
# which registers what `named_parameters` lists, and takes no name with a dot.
def is_tensor_parallel(module: nn.Module, tensor: Tensor) -> bool:
    """Whether parallelize_module alone has divided this tensor of a module; fully_shard on top needs a second mesh."""
    applied = "_distribute_module_applied" in vars(module)
    return applied and is_sharded(tensor) and cast("Any", tensor).device_mesh.ndim == 1
