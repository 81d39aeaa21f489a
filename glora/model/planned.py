"""What a plan says: where an adapter goes, and what is left out and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from glora.config import GLoRAConfig
from glora.model.reach import Coverage
from glora.model.walk import Owner, Site
from glora.text import table


@dataclass(frozen=True)
class PlannedLayer:
    """A matrix that an adapter goes to: where, by which paths, whether it is given a bias for them."""

    at: Site
    config: GLoRAConfig
    paths: tuple[str, ...]
    creates_bias: bool = False

    @property
    def path(self) -> str:
        """The matrix's path: its module's, or its tensor's."""
        return self.at.path

    @property
    def named(self) -> Owner:
        """Its module, with its base tensors."""
        return self.at.named

    @property
    def module(self) -> nn.Module:
        """Its module."""
        return self.at.module

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key within the layer (`A.left`) to shape of each tensor that its paths have."""
        *batch, out_features, in_features = self.at.weight.shape
        return self.config.shapes(out_features, in_features, self.paths, tuple(batch))

    @property
    def forms(self) -> str:
        """The forms of its paths, `A=lora B=vector`."""
        return " ".join(f"{path}={self.config.forms[path]}" for path in self.paths)

    @property
    def rank(self) -> int | None:
        """The rank; None where no path is low rank."""
        return self.config.rank if any(self.config.forms[path] == "lora" for path in self.paths) else None

    @property
    def parameters(self) -> int:
        """How many trainable numbers its paths have."""
        return sum(map(math.prod, self.shapes.values()))


@dataclass(frozen=True)
class PlannedHead:
    """A module with tensors of its own that trains as a whole, in a copy that belongs to the adapter.

    Attributes:
        names: the tensors that are copied; not those that are tied to an earlier head's.
        shared: of these, name to where else the very Parameter stands: the module, and its name there.
    """

    named: Owner
    names: tuple[str, ...]
    shared: Mapping[str, tuple[tuple[Owner, str], ...]] = field(default_factory=dict[str, Any])

    @property
    def path(self) -> str:
        """The module's path."""
        return self.named.path

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self.named.module

    @property
    def places(self) -> list[tuple[Owner, str]]:
        """Everywhere else that its Parameters stand."""
        return [place for places in self.shared.values() for place in places]

    @property
    def parameters(self) -> int:
        """How many trainable numbers it has."""
        tensors = [self.named.tensors[name] for name in self.names]
        return sum(t.numel() for t in tensors if isinstance(t, nn.Parameter))


def plan_heads(modules: Iterable[Owner], chosen: Iterable[Owner]) -> list[PlannedHead]:
    """Each chosen module as a head, with all places in the model that read its Parameters (Note [Tied heads])."""
    places: dict[int, list[tuple[Owner, str]]] = {}
    for named in modules:
        for name, tensor in named.tensors.items():
            if isinstance(tensor, nn.Parameter):
                places.setdefault(id(tensor), []).append((named, name))
    heads: list[PlannedHead] = []
    taken: set[int] = set()
    for head in chosen:
        names = tuple([name for name, tensor in head.tensors.items() if id(tensor) not in taken])
        shared: dict[str, tuple[tuple[Owner, str], ...]] = {}
        for name in names:
            tensor = head.tensors[name]
            others = [at for at in places.get(id(tensor), []) if (at[0].module, at[1]) != (head.module, name)]
            taken |= {id(tensor)} if isinstance(tensor, nn.Parameter) else set()
            shared |= {name: tuple(others)} if others else {}
        if names:
            heads.append(PlannedHead(head, names, shared))
    return heads


@dataclass(frozen=True)
class Skipped:
    """A layer that the targets reach and that is left as it is, and why.

    Attributes:
        unsupported: it cannot be adapted (rather than: it was asked to be left out).
    """

    path: str
    reason: str
    unsupported: bool = False


@dataclass(frozen=True)
class Plan:
    """What `glora.apply` does with the same arguments. Printed, a table.

    Attributes:
        name: the adapter's name.
        layers: the layers that it goes to.
        heads: the modules that train as a whole: those with tensors of their own at or below `trainable=`.
        skipped: layers that the targets reach and that are left as they are.
        without_bias: paths of the layers that lose C, D and E because they have no bias.
        reach: the share of the model's matrices that is adapted or trains as a whole; None where a file says it all.
    """

    name: str
    layers: tuple[PlannedLayer, ...]
    heads: tuple[PlannedHead, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    without_bias: tuple[str, ...] = ()
    reach: Coverage | None = None

    @property
    def parameters(self) -> int:
        """Trainable numbers in all, heads included."""
        return sum(row.parameters for row in (*self.layers, *self.heads))

    def __str__(self) -> str:

        def no_bias(layer: PlannedLayer) -> str:
            return " (no bias)" if layer.path in self.without_bias else ""

        title = f"adapter {self.name!r}: {len(self.layers)} layers, {self.parameters:,} trainable parameters"
        rows = [
            [layer.path, f"{layer.forms}{no_bias(layer)}", str(layer.rank or "-"), f"{layer.parameters:,}"]
            for layer in self.layers
        ]
        rows += [[head.path, "trainable", "-", f"{head.parameters:,}"] for head in self.heads]
        rows += [[skipped.path, f"skipped: {skipped.reason}", "-", "-"] for skipped in self.skipped]
        text = table(title, ["module", "forms", "rank", "parameters"], rows)
        return text if self.reach is None or not self.reach.rest else f"{text}\n{self.reach}"
