"""A choice as genes, and how genes keep to a budget."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from glora.config import GLoRAConfig
from glora.search.choices import Layer


class Genes:
    """The genes of a supernet: one for each path of each layer and one for its rank, where there is a choice.

    Args:
        layers: path to layer.
        budget: the most parameters that a choice may have; None for no bound.

    Attributes:
        values: name of each gene (`<path of the layer> <A to E, or rank>`) to its values, the cheapest first.

    Raises:
        ValueError: the smallest choice is over the budget, or there is nothing to choose.
    """

    def __init__(self, layers: Mapping[str, Layer], budget: int | None) -> None:
        self.layers, self.budget = layers, budget
        self.values: dict[str, tuple[Any, ...]] = {}
        for path, layer in layers.items():
            choices: dict[str, tuple[Any, ...]] = {p: forms[::-1] for p, forms in layer.space.forms.items()}
            if any("lora" in forms for forms in choices.values()):
                choices["rank"] = tuple(layer.space.ranks)
            for gene, values in choices.items():
                if len(values) > 1:
                    self.values[f"{path} {gene}"] = values
        smallest = self.parameters(self.configs({}))
        if budget is not None and budget < smallest:
            raise ValueError(f"budget={budget} must hold the smallest choice of the space, of {smallest} parameters.")
        if not self.values:
            raise ValueError("The space of a search must hold more than one choice; this one has one form everywhere.")

    def config(self, path: str, genes: Mapping[str, Any]) -> GLoRAConfig:
        """A layer's config; the cheapest form of each gene that is left out."""
        space = self.layers[path].space
        forms = {p: genes.get(f"{path} {p}", known[-1]) for p, known in space.forms.items()}
        return space.config(forms, genes.get(f"{path} rank", space.ranks[0]))

    def configs(self, genes: Mapping[str, Any]) -> dict[str, GLoRAConfig]:
        """Every layer's config. Equal choices have equal configs: a rank without a low-rank path has no say."""
        return {path: self.config(path, genes) for path in self.layers}

    def parameters(self, configs: Mapping[str, GLoRAConfig]) -> int:
        """How many parameters a choice has."""
        return sum([self.layers[path].count(config) for path, config in configs.items()])

    # Note [Under the budget]
    # Of random choices none is near a budget of a thousandth, and a search that rejected what is over it would never
    # begin. So a choice is built up under it. All genes start at their cheapest. Those that are inherited are put in
    # first, in random order, and those that are not (all in the first generation, the mutated ones later) are drawn
    # after them; what does not fit stays at its cheapest. So mutations take no room from what is inherited, and a
    # choice that fits is inherited whole. Random search draws all its genes in this way.
    def fit(self, inherited: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
        """A complete choice within the budget (Note [Under the budget]).

        Args:
            inherited: the genes that another choice handed down.
            rng: orders them, and draws the rest.
        """
        genes = {gene: values[0] for gene, values in self.values.items()}
        costs = {path: self.layers[path].count(self.config(path, genes)) for path in self.layers}
        for gene in sorted(rng.sample(list(genes), len(genes)), key=lambda gene: gene not in inherited):
            path, before = gene.rpartition(" ")[0], genes[gene]
            genes[gene] = inherited[gene] if gene in inherited else rng.choice(self.values[gene])
            cost = self.layers[path].count(self.config(path, genes))
            if self.budget is None or sum(costs.values()) - costs[path] + cost <= self.budget:
                costs[path] = cost
            else:
                genes[gene] = before
        return genes
