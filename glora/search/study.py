"""The search as optuna keeps it: its storage, its trials, and what it samples. Imports optuna."""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import NSGAIISampler, RandomSampler
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from glora.config import GLoRAConfig
from glora.search.genes import Genes
from glora.search.result import Trial

_ATTEMPTS = 200


# Note [Resumed]
# A search that is cut off leaves a trial in the storage that has not ended, and never will. It is left out of all that
# follows: a trial's draws depend on the seed and on how many have ended before it, not on its number or on earlier
# draws. So the search goes on as if it had not been cut off. Two processes at once would make the same draws.
def ended(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that were evaluated, failed ones included, in order (Note [Resumed])."""
    return study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.FAIL])


class BudgetSampler(RandomSampler):
    """Genes from NSGA-II or at random, fitted to the budget, and drawn again where a trial has them already."""

    def __init__(self, genes: Genes, kind: str, seed: int) -> None:
        super().__init__()
        self.genes, self.kind, self.seed = genes, kind, seed
        self.known: dict[int, tuple[object, ...]] = {}
        self.space: dict[str, BaseDistribution] = {g: CategoricalDistribution(v) for g, v in genes.values.items()}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002
        """All genes."""
        return self.space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A complete choice.

        Raises:
            TrialPruned: no draw gave a new one.
        """
        others = ended(study)
        self.known |= {each.number: self._key(each.params) for each in others if each.number not in self.known}
        taken, rng = set(self.known.values()), random.Random(f"{self.seed} {len(others)}")
        for attempt in range(_ATTEMPTS):
            inherited: dict[str, Any] = {}
            if self.kind == "nsga2" and attempt < _ATTEMPTS // 2:
                # The paper's figures; crossover is uniform by default.
                nsga2 = NSGAIISampler(population_size=50, mutation_prob=0.2, seed=rng.getrandbits(32))
                inherited = nsga2.sample_relative(study, trial, search_space)
            genes = self.genes.fit(inherited, rng)
            if self._key(genes) not in taken:
                return genes
        raise optuna.TrialPruned

    def _key(self, genes: dict[str, Any]) -> tuple[object, ...]:
        return tuple(self.genes.configs(genes).values())


def open_study(genes: Genes, kind: str, seed: int, storage: object, model: object = None) -> optuna.Study:
    """The study of this search in the storage, a new one where there is none; `model` tells supernets apart."""
    # The same name for the same search, however many trials are asked for.
    layers = [(path, layer.space, [part.weight_shape for part in layer.parts]) for path, layer in genes.layers.items()]
    identity = repr((layers, genes.budget, kind, seed, model))
    return optuna.create_study(
        storage=_storage(storage),
        sampler=BudgetSampler(genes, kind, seed),
        study_name=f"glora-{hashlib.sha256(identity.encode()).hexdigest()[:16]}",
        directions=["maximize"] if genes.budget is not None else ["maximize", "minimize"],
        load_if_exists=True,
    )


def _storage(storage: object) -> Any:
    if not isinstance(storage, (str, os.PathLike)):
        return storage
    file = str(storage)  # pyright: ignore[reportUnknownArgumentType]
    if "://" in file:
        return file
    if file.endswith((".db", ".sqlite", ".sqlite3")):
        return f"sqlite:///{file}"
    return optuna.storages.JournalStorage(JournalFileBackend(file))


def make(study: optuna.Study, genes: Genes, score: Callable[[Mapping[str, GLoRAConfig]], float]) -> bool:
    """Draw a choice and score it; False where no draw gave a new one. A score that raises fails the trial alone."""
    trial = study.ask()
    try:
        configs = genes.configs({gene: trial.suggest_categorical(gene, v) for gene, v in genes.values.items()})
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
        return False
    try:
        value = score(configs)
        if not math.isfinite(value):
            raise ValueError(f"evaluate gave {value}")
    except Exception as error:
        trial.set_user_attr("error", f"{type(error).__name__}: {error}")
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, [value] if genes.budget is not None else [value, genes.parameters(configs)])
    return True


def evaluated(study: optuna.Study, genes: Genes) -> list[Trial]:
    """What the trials were and scored, in order."""
    trials: list[Trial] = []
    for number, trial in enumerate(ended(study)):
        configs = genes.configs(trial.params)
        targets = {path: config for path, config in configs.items() if config.paths}
        score, error = trial.values[0] if trial.values else None, trial.user_attrs.get("error")
        trials.append(Trial(number, targets, genes.parameters(configs), score, error))
    return trials
