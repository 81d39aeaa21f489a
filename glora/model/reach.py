"""Which share of a model's matrices its adapters reach, and what they leave out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from glora.matrices import matrices_of
from glora.model.walk import Owner
from glora.spec import join
from glora.text import shorten

_MOST = 6


@dataclass(frozen=True)
class Coverage:
    """A share of the numbers in a model's matrices: all parameters of two axes or more but embeddings.

    Attributes:
        reached: how many numbers there are in the matrices that an adapter reaches, or that train as a whole.
        total: how many in all.
        rest: what is not reached, by kind of module and name of the tensor (`MixtralExperts.gate_up_proj`), with how
            many numbers it has, the largest first.
    """

    reached: int
    total: int
    rest: tuple[tuple[str, int], ...] = ()

    @property
    def share(self) -> float:
        """Reached of all, 1.0 where there is nothing to reach."""
        return self.reached / self.total if self.total else 1.0

    def __str__(self) -> str:
        named = [f"{name} {numbers / self.total:.0%}" for name, numbers in self.rest]
        rest = f"; not reached: {shorten(named, _MOST, ', ', ' and ')}" if named else ""
        return f"reaches {self.share:.0%} of {self.total:,} matrix numbers{rest}"


def reach(modules: Sequence[Owner], reached: Collection[tuple[int, str]], outputs: Collection[int]) -> Coverage:
    """The share of the model's matrices that is reached.

    Args:
        modules: all of the model.
        reached: module id and tensor name of what is.
        outputs: ids of the output embeddings, which do not count, as embeddings do not.
    """
    kinds = (nn.Embedding, nn.EmbeddingBag)
    embeddings = [m for m in modules if isinstance(m.module, kinds) or id(m.module) in outputs]
    seen = {id(tensor) for named in embeddings for tensor in named.tensors.values()}  # and what is tied to them
    ours = total = 0
    rest: dict[str, int] = {}
    for named in modules:
        biases = {matrix.bias for matrix in matrices_of(named.module, named.tensors)}  # those of experts have two axes
        for name, tensor in named.tensors.items():
            if not isinstance(tensor, nn.Parameter) or tensor.ndim < 2 or name in biases or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            total += tensor.numel()
            if (id(named.module), name) in reached:
                ours += tensor.numel()
            else:
                kind = type(named.module).__name__.removeprefix("Parametrized")
                rest[join(kind, name)] = rest.get(join(kind, name), 0) + tensor.numel()
    return Coverage(ours, total, tuple(sorted(rest.items(), key=lambda item: (-item[1], item[0]))))
