"""A choice as genes, and how genes keep to a budget."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
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
        owner: name of each gene to the path of its layer.

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
        smallest = self.parameters({path: layer.space.smallest for path, layer in layers.items()})
        if budget is not None and budget < smallest:
            raise ValueError(f"budget={budget} must hold the smallest choice of the space, of {smallest} parameters.")
        if not self.values:
            raise ValueError("The space of a search must hold more than one choice; this one has one form everywhere.")

    def config(self, path: str, genes: Mapping[str, Any]) -> GLoRAConfig:
        """A layer's config."""
        space = self.layers[path].space
        forms = {p: genes.get(f"{path} {p}", known[-1]) for p, known in space.forms.items()}
        return space.config(forms, genes.get(f"{path} rank", space.ranks[0]))

    def configs(self, genes: Mapping[str, Any]) -> dict[str, GLoRAConfig]:
        """Every layer's config. Equal choices have equal configs: a rank without a low-rank path has no say."""
        return {path: self.config(path, genes) for path in self.layers}

    def parameters(self, configs: Mapping[str, GLoRAConfig]) -> int:
        """How many parameters a choice has."""
        return sum([self.layers[path].count(config) for path, config in configs.items()])

    def every(self) -> Iterator[dict[str, Any]]:
        """The genes of each choice within the budget; a rank that has no say is the lowest."""
        cheapest = {gene: values[0] for gene, values in self.values.items()}
        begun: list[tuple[Any, ...]] = [()]  # the values of the first genes
        while begun:
            first = begun.pop()
            genes = cheapest | dict(zip(self.values, first, strict=False))
            configs = self.configs(genes)
            if self.budget is not None and self.parameters(configs) > self.budget:
                continue  # nor does any choice that begins like this one: the other genes are at their cheapest
            if len(first) < len(genes):
                begun += [(*first, value) for value in list(self.values.values())[len(first)]]
            elif all(genes.get(f"{path} rank", config.rank) == config.rank for path, config in configs.items()):
                yield genes

    # Note [Under the budget]
    # Of random choices none is near a budget of a thousandth, and a search that rejected what is over it would never
    # begin. So a choice is fitted before it is evaluated. Its inherited genes are cut, a random one by one step at a
    # time, until it is under the budget. The genes that it does not inherit (all in the first generation, the mutated
    # ones later) start at their cheapest and are drawn in random order; a draw is kept if it fits. So inherited genes
    # are not cut to make room for mutations. Random search draws all its genes in this way.
    def fit(self, inherited: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
        """A complete choice within the budget (Note [Under the budget]).

        Args:
            inherited: the genes that another choice handed down.
            rng: cuts them, and draws the rest.
        """
        genes = {gene: inherited.get(gene, values[0]) for gene, values in self.values.items()}
        costs = {path: self.layers[path].count(self.config(path, genes)) for path in self.layers}

        def is_over() -> bool:
            return self.budget is not None and sum(costs.values()) > self.budget

        def put(gene: str, value: Any) -> None:
            genes[gene], path = value, self.owner[gene]
            costs[path] = self.layers[path].count(self.config(path, genes))

        reducible = [gene for gene, value in genes.items() if value != self.values[gene][0]]
        while is_over():
            gene = rng.choice(reducible)
            values = self.values[gene]
            put(gene, values[values.index(genes[gene]) - 1])
            if genes[gene] == values[0]:
                reducible.remove(gene)
        missing = [gene for gene in genes if gene not in inherited]
        for gene in rng.sample(missing, len(missing)):
            before = genes[gene]
            put(gene, rng.choice(self.values[gene]))
            if is_over():
                put(gene, before)
        return genes
