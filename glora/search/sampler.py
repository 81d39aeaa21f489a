"""Optuna's samplers, kept to a budget, without repeats, and the same after a restart. Imports optuna."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.trial import FrozenTrial

from glora.search.genes import Genes

# The paper's figures: population 50, uniform crossover (optuna's default), mutation 0.2.
SAMPLERS: dict[str, Callable[[int], BaseSampler] | None] = {
    "nsga2": lambda seed: NSGAIISampler(population_size=50, mutation_prob=0.2, seed=seed),
    "tpe": lambda seed: TPESampler(multivariate=True, seed=seed),
    "random": None,
}
_ATTEMPTS = 200


class Exhausted(Exception):
    """Every choice that is drawn has been evaluated."""


class BudgetSampler(BaseSampler):
    """What another sampler proposes, fitted to the budget, and drawn again where a trial has it already.

    The draws of a trial go by the seed and its number alone, and not by those before it: a search that is resumed goes
    on as if it had not ended, and processes that share a storage draw differently.
    """

    def __init__(self, genes: Genes, kind: str, seed: int) -> None:
        self.genes, self.seed, self.make = genes, seed, SAMPLERS[kind]
        self.space: dict[str, BaseDistribution] = {g: CategoricalDistribution(v) for g, v in genes.values.items()}
        self.known: dict[int, Any] = {}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002
        """All genes."""
        return self.space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A whole choice.

        Raises:
            Exhausted: no new one was found.
        """
        rng = random.Random(f"{self.seed} {trial.number}")
        for other in study.get_trials(deepcopy=False):
            if other.number not in self.known and len(other.params) == len(self.space):
                self.known[other.number] = self._key(other.params)
        taken = {key for number, key in self.known.items() if number != trial.number}
        for attempt in range(_ATTEMPTS):
            given: dict[str, Any] = {}
            if self.make is not None and attempt < _ATTEMPTS // 2:
                given = self.make(rng.getrandbits(32)).sample_relative(study, trial, search_space)
            genes = self.genes.fit(given, rng)
            if self._key(genes) not in taken:
                return genes
        raise Exhausted

    def _key(self, genes: dict[str, Any]) -> tuple[object, ...]:
        return tuple(self.genes.configs(genes).values())

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never asked: every gene is in the space."""
        raise NotImplementedError
