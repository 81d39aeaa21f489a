"""The search for the best choice, through optuna."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from glora.files.container import import_optional
from glora.model.walk import Model
from glora.search.genes import Genes, without_nothing
from glora.search.result import Result, Trial, result_of
from glora.search.supernet import layers_of

# Calls of `evolve` in this process that are under way.
_live: set[str] = set()


def evolve(
    model: Model,
    evaluate: Callable[[Model], float],
    *,
    budget: int | None = None,
    trials: int = 200,
    sampler: Literal["nsga2", "random", "tpe"] = "nsga2",
    storage: object = None,
    seed: int = 0,
) -> Result:
    """Search a supernet for its best choice of forms.

    Every choice is brought under the budget before it is evaluated, and none is evaluated twice
    (Note [Under the budget]). The same arguments on the same storage go on with the same study: after an interruption,
    as if there had been none, or in several processes at once, on one machine or many. Trials that a process of this
    machine left when it was killed are made again.

    Args:
        model: the model, with a trained supernet.
        evaluate: the score of the model as it is then switched, to be maximised. Give it data that neither trained the
            model nor will test it. One that raises, or gives no finite number, costs that trial alone.
        budget: the most trainable parameters, heads left out: they are the same in every choice. None searches for both
            a high score and few parameters.
        trials: evaluations in all, those found in the storage included; fewer where the space has no more choices.
        sampler: `"nsga2"` (evolution with the paper's population of 50, uniform crossover and mutation 0.2), or as
            baselines `"random"` and `"tpe"`.
        storage: None for memory; a file, SQLite's (`.db`, `.sqlite`, `.sqlite3`) or else a journal; a URL or an optuna
            storage.
        seed: of the search.

    Returns:
        The result; the model is switched to its best choice.

    Raises:
        ValueError: as `choose`; an argument of the wrong kind; a budget below the smallest choice.
        RuntimeError: no evaluation gave a number.
        ImportError: optuna is not installed (the extra `glora[search]`).

    Source: GLoRA, arXiv 2306.07967, section 3.3; NSGA-II, doi 10.1109/4235.996017.

    Example:
        >>> import torch, glora
        >>> space = glora.search.Space(A=["none"], ranks=[1])
        >>> layer = glora.search.supernet(torch.nn.Linear(4, 2), "all-linear", space)
        >>> _ = layer.parametrizations.bias[0].default.E.value.data.copy_(torch.tensor([0.0, 1.0]))  # for a training
        >>> found = glora.search.evolve(layer, lambda model: model.bias.sum().item(), budget=8, trials=30)
        >>> found.targets[""].E, found.parameters <= 8
        ('vector', True)
    """
    layers = layers_of(model)
    genes = Genes(layers, budget)
    optuna = import_optional("optuna", "search")
    from glora.search.sampler import SAMPLERS, BudgetSampler, Exhausted

    if sampler not in SAMPLERS or type(trials) is not int or trials < 1:
        raise ValueError(
            f"sampler must be one of {', '.join(SAMPLERS)} and trials an int of at least 1; found {sampler!r} and "
            f"{trials!r}."
        )
    name = _study_name(genes, sampler, seed)
    study = _open(_storage(storage), name, BudgetSampler(genes, sampler, seed), is_double=budget is None)
    before = {path: layer.parts[0].chosen for path, layer in layers.items()}
    call = uuid.uuid4().hex
    _live.add(call)
    bar = import_optional("tqdm", "search").tqdm(total=trials, desc="glora.search", disable=None)
    best: Result | None = None
    try:
        while True:
            trial = _next_trial(study, optuna, trials, call)
            if trial is None:
                break
            try:
                drawn = {gene: trial.suggest_categorical(gene, values) for gene, values in genes.values.items()}
            except Exhausted:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
            configs = genes.configs(drawn)
            for path, layer in layers.items():
                layer.set(configs[path])
            score, error = _score(model, evaluate)
            if score is None:
                trial.set_user_attr("error", error)
                study.tell(trial, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
            else:
                values = [score] if budget is not None else [score, genes.parameters(configs)]
                study.tell(trial, values, skip_if_finished=True)
            bar.update()
        best = result_of(_evaluated(study, genes))
        return best
    finally:
        bar.close()
        _live.discard(call)
        for path, layer in layers.items():
            layer.set(before[path] if best is None else best.targets.get(path, layer.space.config({}, 1)))


def _score(model: Model, evaluate: Callable[[Model], float]) -> tuple[float | None, str]:
    try:
        score = float(evaluate(model))
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    return (score, "") if math.isfinite(score) else (None, f"it gave {score}")


def _next_trial(study: Any, optuna: Any, trials: int, call: str) -> Any:
    """One that was left by a process that is no more, or a new one; None where all are made or under way."""
    there = [t for t in study.get_trials(deepcopy=False) if t.state != optuna.trial.TrialState.PRUNED]
    left = [t for t in there if t.state == optuna.trial.TrialState.RUNNING and _is_left(t.user_attrs.get("worker"))]
    if not left and len(there) >= trials:
        return None
    trial = optuna.trial.Trial(study, left[0]._trial_id) if left else study.ask()
    trial.set_user_attr("worker", [socket.gethostname(), os.getpid(), call])
    return trial


def _is_left(worker: Any) -> bool:
    """Whether a trial's process is known to be no more: its machine is this one, and the process is gone."""
    if worker is None or worker[0] != socket.gethostname():
        return False
    if worker[1] == os.getpid():
        return worker[2] not in _live
    try:
        os.kill(worker[1], 0)  # sends nothing: asks whether there is such a process
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _evaluated(study: Any, genes: Genes) -> list[Trial]:
    found: list[Trial] = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name not in ("COMPLETE", "FAIL"):
            continue
        configs = genes.configs(trial.params)
        score, error = trial.values[0] if trial.values else None, trial.user_attrs.get("error")
        found.append(Trial(trial.number, without_nothing(configs), genes.parameters(configs), score, error))
    return found


def _open(storage: object, name: str, sampler: object, *, is_double: bool) -> Any:
    optuna = import_optional("optuna", "search")
    arguments: dict[str, Any] = {
        "storage": storage,
        "sampler": sampler,
        "study_name": name,
        "directions": ["maximize", "minimize"] if is_double else ["maximize"],
        "load_if_exists": True,
    }
    for wait in (0.1, 0.2, 0.4, 0.8, 1.6):
        # Processes that start together on a new database all make its tables, and all but one fail.
        with contextlib.suppress(import_optional("sqlalchemy.exc", "search").SQLAlchemyError):
            return optuna.create_study(**arguments)
        time.sleep(wait)
    return optuna.create_study(**arguments)


def _study_name(genes: Genes, sampler: str, seed: int) -> str:
    """Equal for equal searches, however many trials they are to have."""
    spaces = [(path, layer.space, sorted(layer.costs.items())) for path, layer in genes.layers.items()]
    return f"glora-{hashlib.sha256(repr((spaces, genes.budget, sampler, seed)).encode()).hexdigest()[:16]}"


def _storage(storage: object) -> object:
    if not isinstance(storage, (str, os.PathLike)):
        return storage
    text = str(storage)  # pyright: ignore[reportUnknownArgumentType]
    if "://" in text:
        return text
    if Path(text).suffix in (".db", ".sqlite", ".sqlite3"):
        return f"sqlite:///{text}"
    journal = import_optional("optuna.storages.journal", "search")
    return import_optional("optuna", "search").storages.JournalStorage(journal.JournalFileBackend(text))
