"""Activation checkpointing: a region's second run keeps to the adapters of its first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, cast

from torch import nn

from glora.layer.parametrization import AdapterWeights, Parametrizations, Store
from glora.layer.pending import is_watched, reopen
from glora.text import quote_names
from glora.torch_internals import checkpointed_regions, running_backward, writes_to

# Note [Checkpoints]
# Activation checkpointing keeps the inputs of a region and runs its forward a second time, in the backward pass. Which
# adapters act may have changed in between: `activate` for another term of the loss, the end of `disabled`. Gradients
# are those of the forward that was run, so the second run takes the adapters of the first. They are noted on torch's
# own record of the region, which lives as long as its graph.
#
# Not seen are the first runs of compiled modules, of regions that another library makes, and, with reentrant autograd,
# of modules in eval mode (every forward without gradients would have to look for a region): their second runs take
# the adapters that act then. Nor is a module that is plain by then: torch raises, but not with reentrant autograd.
_NOTES = "_glora_first_run"


class _FirstRun(NamedTuple):
    """The adapters that acted on a module, and their parts on its tensors.

    Attributes:
        writes: how often the parts' parameters had been written to.
        trained: the parts that were not frozen.
    """

    adapter_weights: AdapterWeights
    parts: list[nn.Module]
    writes: int
    trained: list[nn.Module]


@dataclass
class _Runs:
    """The lookups of a module in a region's first run, in order: the region's own code may switch adapters."""

    runs: list[_FirstRun] = field(default_factory=list[_FirstRun])
    taken: int = 0
    backward: int = -1  # the backward pass that they are taken in: each begins again

    def take(self) -> _FirstRun:
        if self.backward != running_backward():
            self.backward, self.taken = running_backward(), 0
        self.taken += 1
        return self.runs[min(self.taken, len(self.runs)) - 1]


def _notes(record: object) -> dict[nn.Module, _Runs]:
    return cast("dict[nn.Module, _Runs]", vars(record).setdefault(_NOTES, {}))


def of_first_run(module: nn.Module, parametrizations: Parametrizations, active: AdapterWeights) -> AdapterWeights:
    """The adapters that act on the module: those of the first run in a region's second run, else `active`.

    Raises:
        RuntimeError: an adapter of the first run was taken off since, or the module had none.
    """
    nested: list[object] = []  # first runs, in this run or in the second run of a region around them
    for region in checkpointed_regions():
        if region.is_second_run:
            unseen = region.is_reentrant and not module.training
            active = active if unseen else _of_second_run(module, parametrizations, region.record)
            break
        nested.append(region.record)
    for record in nested:
        parts = _parts(parametrizations, active)
        trained = [part for part in parts if not is_watched(part)]
        _notes(record).setdefault(module, _Runs()).runs.append(_FirstRun(active, parts, _writes(parts), trained))
    return active


def _of_second_run(module: nn.Module, parametrizations: Parametrizations, record: object) -> AdapterWeights:
    runs = _notes(record).get(module)
    first = None if runs is None else runs.take()
    parts = [] if first is None else _parts(parametrizations, first.adapter_weights)
    if first is None or first.parts != parts or first.writes != _writes(parts):
        had = "none noted on this module" if first is None else quote_names(first.adapter_weights)
        raise RuntimeError(
            f"Activation checkpointing runs a {type(module).__name__} again in the backward pass, which needs the "
            f"adapters of the forward pass ({had}), and finds others. Call backward before adapters are attached, "
            f"loaded, written to, merged or deleted, or turn checkpointing off."
        )
    for part in first.trained:
        reopen(part)
    return first.adapter_weights


def _writes(parts: list[nn.Module]) -> int:
    return sum(writes_to(parameter) for part in parts for parameter in part.parameters())


def _parts(parametrizations: Parametrizations, adapter_weights: AdapterWeights) -> list[nn.Module]:
    stores = [parametrization._modules["0"] for parametrization in parametrizations.values()]
    parts = [store.parts() for store in stores if isinstance(store, Store)]
    return [each[name] for each in parts for name in adapter_weights if name in each]
