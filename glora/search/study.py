"""The search as optuna keeps it: its storage, its trials, and what it samples. Imports optuna."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
import socket
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, NSGAIISampler
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from glora.config import GLoRAConfig
from glora.search.genes import Genes
from glora.search.result import Trial

_ATTEMPTS = 200


class BudgetSampler(BaseSampler):
    """Genes from NSGA-II or at random, fitted to the budget, and drawn again where a trial has them already.

    The draws of a trial depend on the seed and its number, not on earlier draws: a resumed search goes on as if it had
    not ended, and processes that share a storage draw differently.
    """

    def __init__(self, genes: Genes, kind: str, seed: int) -> None:
        self.genes, self.kind, self.seed = genes, kind, seed
        self.space: dict[str, BaseDistribution] = {g: CategoricalDistribution(v) for g, v in genes.values.items()}
        self.known: dict[int, tuple[object, ...]] = {}
        self.every = genes.every()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002
        """All genes."""
        return self.space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A complete choice.

        Raises:
            TrialPruned: there is no new one.
        """
        rng = random.Random(f"{self.seed} {trial.number}")
        for other in study.get_trials(deepcopy=False):
            if other.number not in self.known and len(other.params) == len(self.space):
                self.known[other.number] = self._key(other.params)
        taken = {key for number, key in self.known.items() if number != trial.number}
        for attempt in range(_ATTEMPTS):
            inherited: dict[str, Any] = {}
            if self.kind == "nsga2" and attempt < _ATTEMPTS // 2:
                # The paper's figures; crossover is uniform by default.
                nsga2 = NSGAIISampler(population_size=50, mutation_prob=0.2, seed=rng.getrandbits(32))
                inherited = nsga2.sample_relative(study, trial, search_space)
            genes = self.genes.fit(inherited, rng)
            if self._key(genes) not in taken:
                return genes
        # Few are left, if any: the next one in order. Those before it were taken and stay so.
        genes = next((genes for genes in self.every if self._key(genes) not in taken), None)
        if genes is None:
            raise optuna.TrialPruned
        return genes

    def _key(self, genes: dict[str, Any]) -> tuple[object, ...]:
        return tuple(self.genes.configs(genes).values())

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never called: every gene is in the space."""
        raise NotImplementedError


def open_study(genes: Genes, kind: str, seed: int, storage: object, model: str = "") -> optuna.Study:
    """The study of this search in the storage, a new one where there is none; `model` tells supernets apart."""
    # The same name for the same search, however many trials are asked for.
    layers = [(path, layer.space, [part.weight_shape for part in layer.parts]) for path, layer in genes.layers.items()]
    identity = repr((layers, genes.budget, kind, seed, model))
    arguments: dict[str, Any] = {
        "storage": _storage(storage),
        "sampler": BudgetSampler(genes, kind, seed),
        "study_name": f"glora-{hashlib.sha256(identity.encode()).hexdigest()[:16]}",
        "directions": ["maximize"] if genes.budget is not None else ["maximize", "minimize"],
        "load_if_exists": True,
    }
    for wait in (0.1, 0.2, 0.4, 0.8, 1.6):
        # Processes that start together on a new database all make its tables, and all but one fail.
        with contextlib.suppress(SQLAlchemyError):
            return optuna.create_study(**arguments)
        time.sleep(wait)
    return optuna.create_study(**arguments)


def _storage(storage: object) -> Any:
    if not isinstance(storage, (str, os.PathLike)):
        return storage
    file = str(storage)  # pyright: ignore[reportUnknownArgumentType]
    if "://" in file:
        return file
    if file.endswith((".db", ".sqlite", ".sqlite3")):
        return f"sqlite:///{file}"
    return optuna.storages.JournalStorage(JournalFileBackend(file))


# Note [Abandoned trials]
# A process that is killed leaves its trial RUNNING. The search goes on with that trial, under its number: draws depend
# on the number, so the study is the same as without the interruption. Optuna's heartbeat cannot do this:
# - A stale trial is failed for good and made again under another number: the resumed study is another one.
# - It is stale only after a grace period, so a search that is resumed at once would leave it out.
# - Only RDBStorage has a heartbeat, the journal has none.
# - It beats in `Study.optimize` alone, which fails the trial that Ctrl-C ends.
# So each trial carries the machine and the process that makes it. Trials of other machines are left alone.
def next_trial(study: optuna.Study, trials: int) -> optuna.Trial | None:
    """An abandoned trial (Note [Abandoned trials]), or a new one; None where all are made or under way."""
    made = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.PRUNED]
    abandoned = [trial for trial in made if trial.state == TrialState.RUNNING and _is_abandoned(trial)]
    if not abandoned and len(made) >= trials:
        return None
    trial = optuna.Trial(study, abandoned[0]._trial_id) if abandoned else study.ask()
    trial.set_user_attr("process", [socket.gethostname(), os.getpid()])
    return trial


def make(
    study: optuna.Study, trial: optuna.Trial, genes: Genes, score: Callable[[Mapping[str, GLoRAConfig]], float]
) -> bool:
    """Draw a trial's choice and score it; False where every choice is made. A score that raises fails the trial."""
    try:
        configs = genes.configs({gene: trial.suggest_categorical(gene, v) for gene, v in genes.values.items()})
        try:
            value = score(configs)
            if not math.isfinite(value):
                raise ValueError(f"evaluate gave {value}")
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        else:
            values = [value] if genes.budget is not None else [value, genes.parameters(configs)]
            study.tell(trial, values, skip_if_finished=True)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
        return False
    except BaseException:
        with contextlib.suppress(UpdateFinishedTrialError):
            trial.set_user_attr("process", None)
        raise
    return True


@contextlib.contextmanager
def taking_part(study: optuna.Study) -> Generator[bool]:
    """Inside the `with` block this process is known to be at work; yields whether no other one is."""
    others = [who.rpartition(" ") for who, works in study.user_attrs.items() if works]
    me = f"{socket.gethostname()} {os.getpid()}"
    before = study.user_attrs.get(me, False)  # a search inside of an evaluation of another
    study.set_user_attr(me, True)
    try:
        yield all(_is_gone(machine, int(number)) for machine, _, number in others)
    finally:
        study.set_user_attr(me, before)


def _is_abandoned(trial: FrozenTrial) -> bool:
    """Whether nobody makes the trial any more, as far as this machine knows."""
    process = trial.user_attrs.get("process", ["", 0])  # a trial that has only just begun has none
    return process is None or _is_gone(*process)


def _is_gone(machine: str, process: int) -> bool:
    """Whether a process has ended; of another machine's it is not known."""
    if machine != socket.gethostname():
        return False
    try:
        os.kill(process, 0)  # sends nothing: asks whether there is such a process
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def evaluated(study: optuna.Study, genes: Genes) -> list[Trial]:
    """The trials that are made, failed ones included, in order."""
    trials: list[Trial] = []
    for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.FAIL]):
        configs = genes.configs(trial.params)
        targets = {path: config for path, config in configs.items() if config.paths}
        score, error = trial.values[0] if trial.values else None, trial.user_attrs.get("error")
        trials.append(Trial(trial.number, targets, genes.parameters(configs), score, error))
    return trials
