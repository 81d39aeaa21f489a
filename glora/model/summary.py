"""What is attached to a model, and what it costs, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from glora.layer.heads import Head
from glora.layer.parametrization import Paths, Store
from glora.model.reach import Coverage, reach
from glora.model.targets import output_embeddings
from glora.model.walk import Owner, adapted_sites, owners
from glora.text import table


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
    """The adapters of a model. Printed, a table.

    Attributes:
        rows: one for each adapter on each module.
        trainable: numbers in the whole model that ask for a gradient.
        total: numbers in the whole model.
        reach: the share of the model's matrices that an adapter is on, or that train as a whole.
    """

    rows: tuple[SummaryRow, ...]
    trainable: int
    total: int
    reach: Coverage

    def __str__(self) -> str:
        share = self.trainable / self.total if self.total else 0.0
        text = table(
            f"{self.trainable:,} trainable of {self.total:,} parameters ({share:.2%})",
            ["module", "adapter", "forms", "rank", "trainable / total"],
            [
                [row.path, row.adapter, row.forms, str(row.rank or "-"), f"{row.trainable:,} / {row.total:,}"]
                for row in self.rows
            ],
        )
        return f"{text}\n{self.reach}" if self.reach.rest and self.rows else text


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
    rows: list[SummaryRow] = []
    modules = owners(model)
    for path, tensors, stores in _places(modules):
        base = sum(t.numel() for t in tensors if isinstance(t, nn.Parameter))
        for name in dict.fromkeys(n for store in stores for n in store.parts()):
            parts = [store.parts()[name] for store in stores if name in store.parts()]
            paths = {path: p.config.forms[path] for p in parts if isinstance(p, Paths) for path in p.paths()}
            parameters = [parameter for part in parts for parameter in part.parameters()]
            rows.append(
                SummaryRow(
                    path,
                    name,
                    " ".join(f"{key}={form}" for key, form in paths.items()) or ("trainable" if parameters else "tied"),
                    next((p.config.rank for p in parts if isinstance(p, Paths) and "lora" in paths.values()), None),
                    sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
                    base + sum(parameter.numel() for parameter in parameters),
                )
            )
    everything = list(model.parameters())
    return Summary(
        tuple(rows),
        sum(parameter.numel() for parameter in everything if parameter.requires_grad),
        sum(parameter.numel() for parameter in everything),
        reach(modules, {(id(m.module), name) for m in modules for name in _reached(m)}, output_embeddings(modules)),
    )


def _places(modules: list[Owner]) -> Iterator[tuple[str, list[Tensor], Sequence[Store]]]:
    """Each adapted matrix, and each head as a whole: its path, its base tensors, the adapters on them."""
    for named in modules:
        for at in adapted_sites(named):
            names = [name for name in (at.matrix.weight, at.matrix.bias) if name is not None]
            yield (
                at.path,
                [named.tensors[name] for name in names if name in named.tensors],
                [named.stores[name] for name in names if name in named.stores],
            )
        heads = [store for store in named.stores.values() if isinstance(store, Head)]
        if heads:
            yield named.path, list(named.tensors.values()), heads


def _reached(named: Owner) -> set[str]:
    """The tensors of a module that an adapter reaches: a weight also by its bias."""
    return set(named.stores) | {at.matrix.weight for at in adapted_sites(named)}
