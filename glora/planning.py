"""What `apply` will do: decided here in full, before anything changes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from glora import paths
from glora.config import BIAS_PATHS, WEIGHT_PATHS, GLoRAConfig
from glora.fitness import Ties, find_ties, unfit_head, unfit_layer
from glora.layer import adapters_of
from glora.parametrization import Bias
from glora.tables import table
from glora.targets import ALL_LINEAR, Selection, Targets, Trainable, choose, output_embeddings, select
from glora.tree import Found, adapted, find, own_tensors


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that an adapter goes to: where, by which paths, whether it is given a bias for them."""

    path: str
    module: nn.Linear = field(repr=False)
    config: GLoRAConfig
    paths: tuple[str, ...]
    creates_bias: bool = False

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
        out_features, in_features = own_tensors(self.module)["weight"].shape
        return sum(
            math.prod(shape)
            for path in self.paths
            for shape in paths.shapes(
                path,
                self.config.forms[path],
                out_features=out_features,
                in_features=in_features,
                rank=self.config.rank,
                product=self.config.product,
            ).values()
        )


@dataclass(frozen=True)
class PlannedHead:
    """A module with tensors of its own that trains as a whole, in a copy that belongs to the adapter."""

    path: str
    module: nn.Module = field(repr=False)

    @property
    def parameters(self) -> int:
        """How many trainable numbers it has."""
        return sum(t.numel() for t in own_tensors(self.module).values() if isinstance(t, nn.Parameter))


@dataclass(frozen=True)
class Skipped:
    """A linear layer that the targets reach and that is left as it is, and why.

    Attributes:
        unfit: it cannot be adapted (rather than: it was asked to be left out).
    """

    path: str
    reason: str
    unfit: bool = False


@dataclass(frozen=True)
class Plan:
    """What `glora.apply` does with the same arguments. Printed, a table.

    Attributes:
        name: the adapter's name.
        layers: the layers that it goes to.
        heads: the modules that train as a whole: those with tensors of their own at or below `trainable=`.
        skipped: linear layers that the targets reach and that are left as they are.
        without_bias: paths of the layers that lose C, D and E because they have no bias.
    """

    name: str
    layers: tuple[PlannedLayer, ...]
    heads: tuple[PlannedHead, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    without_bias: tuple[str, ...] = ()

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
        return table(title, ["module", "forms", "rank", "parameters"], rows)


def plan(
    model: nn.Module,
    targets: Targets = ALL_LINEAR,
    config: GLoRAConfig | None = None,
    *,
    exclude: Selection = (),
    trainable: Trainable = (),
    name: str = "default",
    freeze: bool = True,  # noqa: ARG001 - apply's signature; it decides about flags, not about what is attached
) -> Plan:
    """What `glora.apply` would do with the same arguments; attaches nothing.

    Returns:
        A `Plan`: the layers with their forms, rank and parameters, the heads, and what is skipped and why.

    Raises:
        ValueError: whatever `apply` would raise it for.

    Example:
        >>> import torch, glora
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2, bias=False))
        >>> print(glora.plan(model, config=glora.GLoRAConfig(A="none", rank=2)))
        adapter 'default': 2 layers, 64 trainable parameters
        module  forms                              rank  parameters
        0       B=lora C=vector D=vector E=vector  2             44
        2       B=lora (no bias)                   2             20
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"model must be a torch.nn.Module; found a {type(model).__name__}.")
    check_name(model, name)
    found = find(model)
    ties = find_ties(found)
    heads = _plan_heads(found, trainable, ties)
    chosen, by_name = choose(found, targets, config)
    left_out = dict.fromkeys(output_embeddings(found), "output embeddings") if targets == ALL_LINEAR else {}
    left_out |= {id(f.module): "excluded" for f in select(found, exclude, "exclude", nn.Linear)}
    left_out |= {id(head.module): "trainable as a whole" for head in heads}
    layers: list[PlannedLayer] = []
    skipped: list[Skipped] = []
    without_bias: list[str] = []
    for f in found:
        layer, layer_config = cast("nn.Linear", f.module), chosen.get(id(f.module))
        if layer_config is None:
            continue
        if id(layer) in left_out:
            skipped.append(Skipped(f.path, left_out[id(layer)]))
            continue
        reason = unfit_layer(layer, layer_config, ties)
        if reason is not None and by_name:
            raise ValueError(f"Every layer that targets= names must be adaptable; {f.path!r} is not: {reason}")
        if reason is not None:
            skipped.append(Skipped(f.path, reason, unfit=True))
            continue
        kept, dropped, creates_bias = _paths(layer, layer_config)
        if dropped:
            without_bias.append(f.path)
        if kept:
            layers.append(PlannedLayer(f.path, layer, layer_config, kept, creates_bias))
        else:
            skipped.append(Skipped(f.path, "its paths need a bias" if dropped else "every path is none"))
    if not layers:
        why = "; ".join(f"{row.path!r}: {row.reason}" for row in skipped[:5])
        raise ValueError(
            f"There must be something to train; all {len(skipped)} layers that targets= reaches are left out ({why}). "
            f"Widen targets=, choose other forms, or for layers without a bias pass create_bias=True in the config."
        )
    return Plan(name, tuple(layers), tuple(heads), tuple(skipped), tuple(without_bias))


def _paths(layer: nn.Linear, config: GLoRAConfig) -> tuple[tuple[str, ...], bool, bool]:
    """The paths that a layer gets, whether some are left out for want of a bias, and whether a bias is created."""
    wanted = tuple(path for path, form in config.forms.items() if form != "none")
    if has_own_bias(layer):
        return wanted, False, False
    if config.create_bias:
        # Without D: it would scale zeros, and never learn.
        kept = tuple(path for path in wanted if path != "D")
        return kept, False, any(path in BIAS_PATHS for path in kept)
    kept = tuple(path for path in wanted if path in WEIGHT_PATHS)
    return kept, kept != wanted, False


def has_own_bias(layer: nn.Module) -> bool:
    """Whether the base model's layer has a bias; one that `create_bias=True` made does not count."""
    bias = adapters_of(layer).get("bias")
    return not bias.created if isinstance(bias, Bias) else layer._parameters.get("bias") is not None


def _plan_heads(found: list[Found], trainable: Trainable, ties: Ties) -> list[PlannedHead]:
    paths_of = {id(f.module): f.path for f in found}
    heads: dict[int, PlannedHead] = {}
    for reached in select(found, trainable, "trainable", nn.Module):
        inside = [PlannedHead(paths_of[id(f.module)], f.module) for f in find(reached.module) if own_tensors(f.module)]
        if not any(True for _ in reached.module.parameters()):
            raise ValueError(f"trainable= must reach modules with parameters; {reached.path!r} has none.")
        for head in inside:
            reason = unfit_head(head.module, ties)
            if reason is not None:
                raise ValueError(
                    f"Every module that trainable= reaches must be fit for it; {head.path!r} is not: {reason}"
                )
            heads.setdefault(id(head.module), head)
    return list(heads.values())


def check_name(model: nn.Module, name: str) -> None:
    """Raise ValueError unless `name` can name a new adapter of the model."""
    if not isinstance(name, str) or not name or "." in name or hasattr(Bias(), name):  # pyright: ignore
        raise ValueError(
            f"An adapter's name must be a string, not empty, without dots, no attribute of nn.Module; found {name!r}."
        )
    for found, adapters in adapted(model):
        if any(name == taken for store in adapters.values() for taken, _ in store.parts()):
            raise ValueError(
                f"An adapter's name must be new to the model; {name!r} is attached already (at {found.path!r}). Choose "
                f"another name=, write into it with glora.load_state_dict, or drop it with glora.delete(model, name)."
            )
