"""What a file of LyCORIS is matched with: the layers and norms of a model, or of its checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from glora.interop.base import Base, weight_at
from glora.matrices import Matrix
from glora.precision import wide
from glora.tensors import dense, gathered


@dataclass(frozen=True)
class Held:
    """A module that a file may adapt.

    Attributes:
        path: its path.
        shape: of its weight as the module holds it.
        matrix: how the weight is a matrix; None where it is none (a norm), or a batch of them.
        base: the model.
        key: its identity: equal for two paths to one module.
    """

    path: str
    shape: tuple[int, ...]
    matrix: Matrix | None
    base: Base = Base()  # noqa: RUF009 - immutable
    key: object = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows and columns of the weight as a matrix."""
        if self.matrix is None:
            raise ValueError(f"{self.path!r} has a weight of {self.shape}, which is no matrix")
        rows, columns = self.matrix.read(torch.empty(self.shape, device="meta")).shape
        return rows, columns

    @property
    def kernel(self) -> tuple[int, ...]:
        """The sizes of a convolution's kernel; none of a linear layer."""
        return self.shape[2:]

    @property
    def channels(self) -> int:
        """The channels of the inputs: columns of the weight at one place of the kernel."""
        return self.sizes[1] // math.prod(self.kernel)

    def weight(self) -> Tensor:
        """The base weight as a matrix, float32 at least."""
        return weight_at(self.base, self.path)

    def tensors(self) -> dict[str, Tensor]:
        """All of the module's own tensors, those of floating dtypes in float32 at least."""
        if self.path not in self.base.owners:
            raise ValueError(f"{self.path!r} must be added to its base tensors: load the file into the model")
        own = self.base.owners[self.path].tensors
        whole = {name: dense(gathered(tensor.detach())).cpu() for name, tensor in own.items()}
        return {name: wide(tensor) if tensor.is_floating_point() else tensor for name, tensor in whole.items()}


def held_by(base: Base) -> dict[str, Held]:
    """Path to module, of a model."""
    held: dict[str, Held] = {}
    for path, owner in base.owners.items():
        weight = owner.tensors.get("weight")
        if weight is not None:
            matrix = base.sites[path].matrix if path in base.sites else None
            one = None if matrix is None or matrix.is_batched else matrix
            held[path] = Held(path, tuple(weight.shape), one, base, id(owner.module))
    return held
