"""A guide that costs no search: each form's first-order effect, and a greedy knapsack over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from glora.config import GLoRAConfig
from glora.model.walk import Model
from glora.search.genes import Genes, without_nothing
from glora.search.supernet import Layer, layers_of

_Batch = TypeVar("_Batch")

Effects = Mapping[str, Mapping[tuple[str, str, int], float]]
"""Path of a layer to path, form and rank to effect."""


def sensitivity(model: Model, loss: Callable[[Model, _Batch], Tensor], batches: Iterable[_Batch]) -> Effects:
    """How much each form of each path would lower the loss in the first step of training.

    The effect of a form with parameters p is the sum of `|d loss / d p|` at the start, over all batches: what one small
    step of Adam, which moves every parameter alike, takes off the loss to first order. At the start every form adds
    nothing, so that the paths do not disturb each other: three backward passes a batch give all forms of all layers.

    Args:
        model: the model, with a supernet that has not been trained; train its head first, if it has a new one
            (`choose(model, {})`).
        loss: of the model on a batch, a mean.
        batches: what to go over, once.

    Returns:
        Path of a layer to `(path, form, rank)` to the effect.

    Raises:
        ValueError: no supernet; no batch.
        RuntimeError: a supernet that is no longer at its start.

    Source: the first-order criterion of SNIP (arXiv 1810.02340), taken at zero.
    """
    layers = layers_of(model)
    tensors: dict[tuple[str, int, str], Tensor] = {
        (path, i, key): p
        for path, layer in layers.items()
        for i, part in enumerate(layer.parts)
        for key, p in part.named_parameters()
    }
    if any(tensor.any() for (_, _, key), tensor in tensors.items() if not key.endswith("right")):
        raise RuntimeError(
            "A sensitivity is one of the start, where every path adds nothing; this supernet has been trained. Take it "
            "before, or call glora.reset_parameters(model)."
        )
    before = {path: layer.parts[0].chosen for path, layer in layers.items()}
    sums = {form: {at: torch.zeros_like(p) for at, p in tensors.items()} for form in ("lora", "vector", "constant")}
    seen = 0
    try:
        for batch in batches:
            seen += 1
            for form, total in sums.items():
                for layer in layers.values():
                    forms = {p: form for p, known in layer.space.forms.items() if form in known}
                    layer.set(layer.space.config(forms, layer.space.ranks[-1]))
                value = loss(model, batch)
                grads: tuple[Tensor | None, ...] = ()
                if value.requires_grad:
                    found = torch.autograd.grad(value, list(tensors.values()), allow_unused=True)
                    grads = cast("tuple[Tensor | None, ...]", found)
                for at, grad in zip(tensors, grads, strict=False):
                    if grad is not None:
                        total[at] += grad
    finally:
        for path, layer in layers.items():
            layer.set(before[path])
    if not seen:
        raise ValueError("A sensitivity needs a batch at least; found none.")
    return {path: _effects(path, layer, sums, seen) for path, layer in layers.items()}


def _effects(
    path: str, layer: Layer, sums: Mapping[str, Mapping[tuple[str, int, str], Tensor]], seen: int
) -> dict[tuple[str, str, int], float]:
    found: dict[tuple[str, str, int], float] = {}
    for p, form, rank in layer.costs:
        effect = 0.0
        for i, part in enumerate(layer.parts):
            if form != "none" and p in part.paths():
                key = f"{p}.left" if (path, i, f"{p}.left") in sums[form] else f"{p}.value"
                grad = sums[form][path, i, key]
                # Of a form that is a part of these tensors, the rest has no gradient.
                effect = (grad[..., :rank] if form == "lora" else grad).abs().sum().item() / seen
        found[p, form, rank] = effect
    return found


def knapsack(model: nn.Module, effects: Effects, budget: int) -> dict[str, GLoRAConfig]:
    """Fill a budget greedily: from the smallest choice, again and again the step of most effect per parameter.

    A step is another form of one path, or another rank of one layer.

    Args:
        model: the model, with its supernet.
        effects: from `sensitivity`.
        budget: the most trainable parameters, heads left out.

    Returns:
        Path of a layer to its forms; layers without any are left out.

    Raises:
        ValueError: no supernet; a budget below the smallest choice.
    """
    layers = layers_of(model)
    genes = Genes(layers, budget)
    chosen = {gene: values[0] for gene, values in genes.values.items()}

    def effect(path: str, config: GLoRAConfig) -> float:
        return sum(effects[path][p, form, config.rank] for p, form in config.forms.items())

    def steps(path: str) -> list[tuple[float, int, str, object]]:
        """Each step of a layer with its effect per parameter and its parameters."""
        now = genes.config(path, chosen)
        found: list[tuple[float, int, str, object]] = []
        for gene in (g for g, owner in genes.owner.items() if owner == path):
            for value in genes.values[gene]:
                then = genes.config(path, chosen | {gene: value})
                gain, cost = effect(path, then) - effect(path, now), layers[path].count(then) - layers[path].count(now)
                if gain > 0 and cost > 0:
                    found.append((gain / cost, cost, gene, value))
        return found

    open_steps = {path: steps(path) for path in layers}
    left = budget - genes.least
    while fitting := [step for found in open_steps.values() for step in found if step[1] <= left]:
        _, cost, gene, value = max(fitting, key=lambda step: step[0])
        chosen[gene], left = value, left - cost
        open_steps[genes.owner[gene]] = steps(genes.owner[gene])
    return without_nothing(genes.configs(chosen))
