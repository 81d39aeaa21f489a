"""What a plan says: where an adapter goes, what is left out and why, and which share of the model it covers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from glora.config import GLoRAConfig
from glora.model.walk import Owner, Site
from glora.spec import LayerSpec, join
from glora.text import Table, shorten

_MOST = 6  # kinds of modules that a coverage names


@dataclass(frozen=True)
class PlannedLayer:
    """A matrix that an adapter goes to.

    Attributes:
        site: the matrix.
        spec: what it gets: the forms that it takes, `"none"` for what is left out, and its own sizes.
        creates_bias: whether it is given a bias for its paths C and E.
    """

    site: Site
    spec: LayerSpec
    creates_bias: bool = False

    @property
    def path(self) -> str:
        """The matrix's path: its module's, or its tensor's."""
        return self.site.path

    @property
    def module(self) -> nn.Module:
        """Its module."""
        return self.site.module

    @property
    def config(self) -> GLoRAConfig:
        """Its forms and the rest."""
        return self.spec.config

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that it takes."""
        return self.config.paths

    @property
    def forms(self) -> str:
        """The forms of its paths, `A=lora B=vector`."""
        return self.spec.forms

    @property
    def rank(self) -> int | None:
        """The rank; None where no path is low rank."""
        return self.spec.rank

    @property
    def parameters(self) -> int:
        """How many trainable numbers its paths have."""
        return self.spec.parameters


@dataclass(frozen=True)
class PlannedHead:
    """A module with tensors of its own that trains as a whole, in a copy that belongs to the adapter.

    Attributes:
        names: the tensors that are copied; not those that are tied to an earlier head's.
        shared: of these, name to where else the very Parameter stands: the module, and its name there.
    """

    owner: Owner
    names: tuple[str, ...]
    shared: Mapping[str, tuple[tuple[Owner, str], ...]] = field(default_factory=dict[str, Any])

    @property
    def path(self) -> str:
        """The module's path."""
        return self.owner.path

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self.owner.module

    @property
    def places(self) -> list[tuple[Owner, str]]:
        """Everywhere else that its Parameters stand."""
        return [place for places in self.shared.values() for place in places]

    @property
    def parameters(self) -> int:
        """How many trainable numbers it has."""
        tensors = [self.owner.tensors[name] for name in self.names]
        return sum(t.numel() for t in tensors if isinstance(t, nn.Parameter))


def plan_heads(walk: Iterable[Owner], chosen: Collection[Owner]) -> list[PlannedHead]:
    """Each chosen module as a head, with all places in the model that read its Parameters (Note [Tied heads])."""
    places: dict[int, list[tuple[Owner, str]]] = {}
    for owner in walk if chosen else ():
        for name, tensor in owner.tensors.items():
            if isinstance(tensor, nn.Parameter):
                places.setdefault(id(tensor), []).append((owner, name))
    heads: list[PlannedHead] = []
    taken: set[int] = set()
    for head in chosen:
        names = tuple([name for name, tensor in head.tensors.items() if id(tensor) not in taken])
        shared: dict[str, tuple[tuple[Owner, str], ...]] = {}
        for name in names:
            tensor = head.tensors[name]
            others = [(o, n) for o, n in places.get(id(tensor), []) if (o.module, n) != (head.module, name)]
            taken |= {id(tensor)} if isinstance(tensor, nn.Parameter) else set()
            shared |= {name: tuple(others)} if others else {}
        if names:
            heads.append(PlannedHead(head, names, shared))
    return heads


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
        named = [f"{name} {count / self.total:.0%}" for name, count in self.rest]
        rest = f"; not reached: {shorten(named, _MOST, ', ', ' and ')}" if named else ""
        return f"reaches {self.share:.0%} of {self.total:,} numbers in weight matrices{rest}"


def coverage(
    walk: Sequence[Owner], all_sites: Sequence[Site], covered: Collection[tuple[int, str]], outputs: Collection[int]
) -> Coverage:
    """The share of the model's matrices that is reached.

    Args:
        walk: all of the model.
        all_sites: its matrices.
        covered: module id and tensor name of what an adapter reaches.
        outputs: ids of the output embeddings, which do not count, as embeddings do not.
    """
    kinds = (nn.Embedding, nn.EmbeddingBag)
    biases = {(id(site.module), site.matrix.bias) for site in all_sites}  # those of experts have two axes
    embeddings = [owner for owner in walk if isinstance(owner.module, kinds) or id(owner.module) in outputs]
    seen = {id(tensor) for owner in embeddings for tensor in owner.tensors.values()}  # and what is tied to them
    reached = total = 0
    rest: dict[str, int] = {}
    for owner in walk:
        for name, tensor in owner.tensors.items():
            key = id(owner.module), name
            if not isinstance(tensor, nn.Parameter) or tensor.ndim < 2 or key in biases or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            total += tensor.numel()
            if key in covered:
                reached += tensor.numel()
            else:
                kind = join(type(owner.module).__name__.removeprefix("Parametrized"), name)
                rest[kind] = rest.get(kind, 0) + tensor.numel()
    return Coverage(reached, total, tuple(sorted(rest.items(), key=lambda item: (-item[1], item[0]))))


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
    """What `glora.apply` does with the same arguments. Printed, and in a notebook, a table.

    Attributes:
        name: the adapter's name.
        layers: the layers that it goes to.
        heads: the modules that train as a whole: those with tensors of their own at or below `trainable=`.
        skipped: layers that the targets reach and that are left as they are.
        without_bias: paths of the layers that lose C, D and E because they have no bias.
        coverage: the share of the model's matrices that is adapted or trains as a whole; None where a file says it all.
        statistics: the modules of whose running statistics the adapter has copies (Note [Running statistics]).
    """

    name: str
    layers: tuple[PlannedLayer, ...]
    heads: tuple[PlannedHead, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    without_bias: tuple[str, ...] = ()
    coverage: Coverage | None = None
    statistics: tuple[PlannedHead, ...] = ()

    @property
    def parameters(self) -> int:
        """Trainable numbers in all, heads included."""
        return sum(row.parameters for row in (*self.layers, *self.heads))

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def _table(self) -> Table:
        title = f"adapter {self.name!r}: {len(self.layers)} layers, {self.parameters:,} trainable parameters"
        rows: list[Sequence[str | int | None]] = []
        for layer in self.layers:
            no_bias = " (no bias)" if layer.path in self.without_bias else ""
            rows.append([layer.path, f"{layer.forms}{no_bias}", layer.rank, layer.parameters])
        rows += [[head.path, "trainable", None, head.parameters] for head in self.heads]
        rows += [[skipped.path, f"skipped: {skipped.reason}", None, None] for skipped in self.skipped]
        note = "" if self.coverage is None or not self.coverage.rest else str(self.coverage)
        return Table(title, ["module", "forms", "rank", "parameters"], rows, note)
