"""What a computation costs, counted and not timed: matrix products, and bytes that autograd keeps."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Position of the two factors among the arguments of each product that dispatch can see.
_FACTORS = {
    # matmul: whole where autograd does not take it apart, inside of an operator of one's own.
    **dict.fromkeys(["mm", "bmm", "mv", "dot", "vdot", "matmul"], 0),
    **dict.fromkeys(["addmm", "addmm_", "addmv", "addmv_", "baddbmm", "baddbmm_", "addbmm", "addbmm_"], 1),
}

# Nothing is read or written: memory that is only taken, and a view that is not declared as one.
_NO_PASS = {"aten::empty.memory_format", "aten::new_empty", "aten::_unsafe_view"}


class count_products(TorchDispatchMode):
    """Count the floating-point operations of every matrix product in a `with` block, backward and in-place ones too.

    Attributes:
        flops: `2 m n k` for each product.
        narrow: those of them in half precision.
        calls: how many there were.

    Example:
        >>> import torch
        >>> with count_products() as count:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 5)
        >>> count.flops, count.calls
        (60, 1)
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.narrow = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if name in _FACTORS:
            first, second = args[_FACTORS[name] : _FACTORS[name] + 2]
            flops = 2 * first.numel() * (second.shape[-1] if second.ndim > 1 else 1)
            self.flops += flops
            self.narrow += flops if first.dtype in (torch.bfloat16, torch.float16) else 0
            self.calls += 1
        return func(*args, **(kwargs or {}))


class count_passes(TorchDispatchMode):
    """Count the bytes that operations on large tensors read and write in a `with` block, views left out.

    Args:
        numel: a tensor counts that has this many elements at least.

    Attributes:
        bytes: of each such argument and result, once an operation; one that is written in place counts as both, one
            that is given to be written over (`out=`) as a result alone.

    Example:
        >>> import torch
        >>> y = torch.ones(8)
        >>> with count_passes(8) as count:
        ...     _ = y.mul_(2).view(2, 4) + 1
        >>> count.bytes / y.nbytes
        4.0
    """

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.name() not in _NO_PASS:
            read = {name: value for name, value in (kwargs or {}).items() if name != "out"}
            for leaf in tree_leaves((args, read, result)):
                if isinstance(leaf, Tensor) and leaf.numel() >= self.numel:
                    self.bytes += leaf.nbytes
        return result


@dataclass
class Saved:
    """Bytes that autograd keeps between forward and backward; each storage once."""

    storages: dict[int, int] = field(default_factory=dict[int, int])

    @property
    def bytes(self) -> int:
        """All of them."""
        return sum(self.storages.values())


@contextmanager
def count_saved(exclude: Iterable[Tensor]) -> Generator[Saved]:
    """Count the bytes that autograd saves in a `with` block, beyond the storages of `exclude` (x and the parameters).

    Example:
        >>> import torch
        >>> x = torch.ones(4, requires_grad=True)
        >>> with count_saved([x]) as saved:
        ...     y = (x * 2).exp()
        >>> saved.bytes
        16
    """
    left_out = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    saved = Saved()
    kept: list[Tensor] = []  # alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            saved.storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
