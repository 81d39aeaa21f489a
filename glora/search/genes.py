"""A choice as genes, one for each path of each layer and one for its rank; and how genes keep to a budget."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from glora.config import GLoRAConfig
from glora.search.supernet import Layer


class Genes:
    """The genes of a supernet, those left out that have one value alone.

    Args:
        layers: path to layer.
        budget: the most numbers that a choice may have; None for no bound.

    Attributes:
        values: name of each gene (`<path of the layer> <A to E, or rank>`) to its values, the cheapest first.
        least: how many numbers the smallest choice has.

    Raises:
        ValueError: the smallest choice is over the budget, or there is nothing to choose.
    """

    def __init__(self, layers: Mapping[str, Layer], budget: int | None) -> None:
        self.layers, self.budget = layers, budget
        self.values: dict[str, tuple[Any, ...]] = {}
        self.owner: dict[str, str] = {}
        for path, layer in layers.items():
            choices: dict[str, tuple[Any, ...]] = {p: forms[::-1] for p, forms in layer.space.forms.items()}
            if any("lora" in forms for forms in choices.values()):
                choices["rank"] = tuple(layer.space.ranks)
            for gene, values in choices.items():
                if len(values) > 1:
                    self.values[f"{path} {gene}"], self.owner[f"{path} {gene}"] = values, path
        self.least = self.parameters({path: layer.space.smallest for path, layer in layers.items()})
        if budget is not None and budget < self.least:
            raise ValueError(f"budget={budget} must hold the smallest choice of the space, of {self.least} parameters.")
        if not self.values:
            raise ValueError("The space of a search must hold more than one choice; this one has one form everywhere.")

    def config(self, path: str, genes: Mapping[str, Any]) -> GLoRAConfig:
        """A layer's config."""
        space = self.layers[path].space
        forms = {p: genes.get(f"{path} {p}", known[-1]) for p, known in space.forms.items()}
        return space.config(forms, genes.get(f"{path} rank", space.ranks[0]))

    def configs(self, genes: Mapping[str, Any]) -> dict[str, GLoRAConfig]:
        """Every layer's config; equal choices have equal ones, whatever a rank says where no path is low rank."""
        return {path: self.config(path, genes) for path in self.layers}

    def parameters(self, configs: Mapping[str, GLoRAConfig]) -> int:
        """How many numbers a choice of every layer has."""
        return sum(self.layers[path].count(config) for path, config in configs.items())

    def count(self, path: str, genes: Mapping[str, Any]) -> int:
        """How many numbers a layer has."""
        return self.layers[path].count(self.config(path, genes))

    # Note [Under the budget]
    # Of random choices none is near a budget of a thousandth, and a search that threw away what is over it would never
    # begin. So a choice is fitted before it is evaluated. What it inherits is cut, a random gene by one step at a time,
    # until it is under the budget. The genes that it does not inherit (all in the first generation, the mutated ones
    # later) start at their cheapest and are drawn in random order, each draw kept if it fits. So inherited genes are
    # not cut to make room for mutations. Random search draws in this very way.
    def fit(self, given: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
        """A whole choice within the budget (Note [Under the budget]).

        Args:
            given: what is inherited.
            rng: draws the rest.
        """
        genes = {gene: given.get(gene, values[0]) for gene, values in self.values.items()}
        costs = {path: self.count(path, genes) for path in self.layers}
        total = sum(costs.values())

        def over(gene: str, value: Any) -> bool:
            """Set a gene; whether that is over the budget."""
            nonlocal total
            path, genes[gene] = self.owner[gene], value
            cost = self.count(path, genes)
            total += cost - costs[path]
            costs[path] = cost
            return self.budget is not None and total > self.budget

        dear = [gene for gene, value in genes.items() if value != self.values[gene][0]]
        while self.budget is not None and total > self.budget:
            gene = rng.choice(dear)
            values = self.values[gene]
            over(gene, values[values.index(genes[gene]) - 1])
            if genes[gene] == values[0]:
                dear.remove(gene)
        missing = [gene for gene in genes if gene not in given]
        for gene in rng.sample(missing, len(missing)):
            before = genes[gene]
            if over(gene, rng.choice(self.values[gene])):
                over(gene, before)
        return genes


def without_nothing(configs: Mapping[str, GLoRAConfig]) -> dict[str, GLoRAConfig]:
    """The layers that have a path, in the form that `glora.apply` takes."""
    return {path: config for path, config in configs.items() if config.paths}
