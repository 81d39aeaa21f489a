"""What is attached to a model, and what it costs, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from glora.layer.heads import Head
from glora.layer.parametrization import Paths, Store
from glora.model.huggingface import output_embeddings
from glora.model.records import Coverage, coverage
from glora.model.walk import Owner, adapted_sites, owners, sites
from glora.text import Table


@dataclass(frozen=True)
class SummaryRow:
    """One adapter on one module.

    Attributes:
        path: the module's path.
        adapter: the adapter's name.
        forms: the forms of its paths, `A=lora B=vector`, or `trainable` for a head.
        rank: the rank; None where no path is low rank.
        trainable: numbers of the adapter here that ask for a gradient.
        total: all numbers of the base module and of the adapter here.
    """

    path: str
    adapter: str
    forms: str
    rank: int | None
    trainable: int
    total: int


@dataclass(frozen=True)
class Summary:
    """The adapters of a model. Printed, and in a notebook, a table.

    Attributes:
        rows: one for each adapter on each module.
        trainable: numbers in the whole model that ask for a gradient.
        total: numbers in the whole model.
        coverage: the share of the model's matrices that an adapter is on, or that train as a whole.
    """

    rows: tuple[SummaryRow, ...]
    trainable: int
    total: int
    coverage: Coverage

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def _table(self) -> Table:
        share = self.trainable / self.total if self.total else 0.0
        return Table(
            f"{self.trainable:,} trainable of {self.total:,} parameters ({share:.2%})",
            ["module", "adapter", "forms", "rank", "trainable / total"],
            [[row.path, row.adapter, row.forms, row.rank, f"{row.trainable:,} / {row.total:,}"] for row in self.rows],
            str(self.coverage) if self.coverage.rest and self.rows else "",
        )


def summary(model: nn.Module) -> Summary:
    """The adapters of a model: layer, forms, rank, trainable and total parameters.

    Example:
        >>> import torch, glora
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> print(glora.summary(glora.apply(model, ["0"], glora.GLoRAConfig.lora(rank=2), trainable=["1"])))
        42 trainable of 100 parameters (42.00%)
        module  adapter  forms      rank  trainable / total
        0       default  B=lora     2               24 / 64
        1       default  trainable  -               18 / 36
    """
    walk = owners(model)
    rows = [row for path, base, stores in _places(walk) for row in _rows(path, base, stores)]
    covered = {(id(owner.module), name) for owner in walk for name in _reached(owner)}
    parameters = list(model.parameters())
    return Summary(
        tuple(rows),
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        sum(parameter.numel() for parameter in parameters),
        coverage(walk, sites(walk), covered, output_embeddings(walk)),
    )


def _places(walk: list[Owner]) -> Iterator[tuple[str, list[Tensor], Sequence[Store]]]:
    """Each adapted matrix, and each head as a whole: its path, its base tensors, the adapters on them."""
    for owner in walk:
        stores = owner.stores
        for site in adapted_sites(owner):
            names = [name for name in (site.matrix.weight, site.matrix.bias) if name is not None]
            tensors = [owner.tensors[name] for name in names if name in owner.tensors]
            yield site.path, tensors, [stores[name] for name in names if name in stores]
        heads = [store for store in stores.values() if isinstance(store, Head)]
        if heads:
            yield owner.path, list(owner.tensors.values()), heads


def _rows(path: str, base: list[Tensor], stores: Sequence[Store]) -> Iterator[SummaryRow]:
    """A row for each adapter."""
    size = sum(tensor.numel() for tensor in base if isinstance(tensor, nn.Parameter))
    for name in dict.fromkeys(name for store in stores for name in store.parts()):
        parts = [store.parts()[name] for store in stores if name in store.parts()]
        paths = [part for part in parts if isinstance(part, Paths)]
        forms = {key: part.config.forms[key] for part in paths for key in part.paths()}
        parameters = [parameter for part in parts for parameter in part.parameters()]
        yield SummaryRow(
            path,
            name,
            " ".join(f"{key}={form}" for key, form in forms.items()) or ("trainable" if parameters else "tied"),
            paths[0].config.rank if "lora" in forms.values() else None,
            sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            size + sum(parameter.numel() for parameter in parameters),
        )


def _reached(owner: Owner) -> set[str]:
    """The tensors of a module that an adapter reaches: a weight also by its bias."""
    return set(owner.stores) | {site.matrix.weight for site in adapted_sites(owner)}
