"""The search for the best choice, through optuna."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

from torch import Tensor, nn

from glora.config import GLoRAConfig
from glora.files.container import import_optional
from glora.model.adapters import adapters
from glora.model.walk import Model
from glora.search.choices import Layer, complete, layers_of, switch
from glora.search.genes import Genes
from glora.search.result import Result, Trial, result_of
from glora.text import quote_names

_Sampler = Literal["nsga2", "random"]


def evolve(
    model: Model,
    evaluate: Callable[[Model], float],
    *,
    budget: int | None = None,
    trials: int = 200,
    sampler: _Sampler = "nsga2",
    storage: object = None,
    seed: int = 0,
) -> Result:
    """Search a supernet for its best choice of forms.

    Every choice is brought under the budget before it is evaluated, and none is evaluated twice
    (Note [Under the budget]). The same arguments on the same storage go on with the same study after an interruption,
    as if there had been none (Note [Resumed]): one process at a time. A supernet of other weights has a study of its
    own; for another task take another storage (Note [One task a study]).

    Args:
        model: the model, with a trained supernet.
        evaluate: the score of the model as it is then switched, to be maximised. Give it data that neither trained the
            model nor will test it. One that raises, or gives no finite number, costs that trial alone.
        budget: the most trainable parameters, heads left out: they are the same in every choice. None searches for both
            a high score and few parameters.
        trials: evaluations in all, those found in the storage included; fewer where 200 draws in a row give
            no choice that is new, as in a small space that is used up (another seed may find more).
        sampler: `"nsga2"` (evolution with the paper's population of 50, uniform crossover and mutation 0.2), or as a
            baseline `"random"`.
        storage: None for memory; a file, SQLite's (`.db`, `.sqlite`, `.sqlite3`) or else a journal; a URL or an optuna
            storage.
        seed: of the search.

    Returns:
        The result; the model is switched to its best choice.

    Raises:
        ValueError: as `choose`; an argument of the wrong kind; a budget below the smallest choice.
        RuntimeError: no evaluation gave a number; the supernet does not act (another adapter does, or none); scores
            in the storage that `evaluate` does not give again.
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
    _refuse_idle(model, layers)
    genes = Genes(layers, budget)
    if sampler not in get_args(_Sampler) or type(trials) is not int or trials < 1:
        raise ValueError(
            f"sampler must be one of {', '.join(get_args(_Sampler))} and trials an int of at least 1; found "
            f"{sampler!r} and {trials!r}."
        )
    import_optional("optuna", "search")
    tqdm = import_optional("tqdm", "search").tqdm
    from glora.search.study import ended, evaluated, make, open_study

    def score(configs: Mapping[str, GLoRAConfig]) -> float:
        switch(layers, configs)
        return float(evaluate(model))

    study = open_study(genes, sampler, seed, storage, _sample(model))
    before = {path: layer.parts[0].chosen for path, layer in layers.items()}
    try:
        _check_scores(evaluated(study, genes), lambda targets: score(complete(layers, targets)))
        with tqdm(total=trials, desc="glora.search", disable=None) as bar:
            while len(ended(study)) < trials and make(study, genes, score):
                bar.update()
        result = result_of(evaluated(study, genes))
    except BaseException:
        switch(layers, before)
        raise
    switch(layers, complete(layers, result.targets))
    return result


def _sample(model: nn.Module) -> list[Any]:
    """Tells the parameters of two models apart: up to a thousand numbers of each."""
    plain = [p.detach().reshape(-1) for p in model.parameters() if type(p) in (Tensor, nn.Parameter) and not p.is_meta]
    return [cast("Any", numbers[:: max(1, len(numbers) // _MOST)]).tolist() for numbers in plain]


def _refuse_idle(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    """Raise RuntimeError where the supernet does not act, so that every choice would have one score."""
    weights, name = adapters(model), next(iter(layers.values())).parts[0].adapter
    if not weights[name]:
        acting = quote_names(each for each, weight in weights.items() if weight)
        raise RuntimeError(
            f"A search needs a supernet that acts, or all choices have one score; {name!r} does not, and of the "
            f"model's adapters these do: {acting}. Call glora.activate(model, {name!r}), outside of glora.disabled."
        )


# Note [One task a study]
# What a storage holds are the scores of one supernet on one task. The weights of the model are part of the study's
# name. The task is not: `evaluate` is a function, whose name and code say little of its data. So a search that goes on
# with a study evaluates its best choice once more, and the score must be the one that is stored, but for the
# noise of an accelerator.
_NOISE = 0.01
_MOST = 1000  # numbers of a parameter


def _check_scores(trials: Sequence[Trial], score: Callable[[Mapping[str, GLoRAConfig]], float]) -> None:
    """Raise RuntimeError where a stored score is not what the evaluation gives now (Note [One task a study])."""
    scores = [trial.score for trial in trials if trial.score is not None]
    if not scores:
        return
    best = result_of(trials)
    found = score(best.targets)
    allowed = _NOISE * max(abs(best.score), max(scores) - min(scores))
    if not abs(found - best.score) <= allowed:
        raise RuntimeError(
            f"A search goes on with a study of its own task alone; the best choice in the storage has the score "
            f"{best.score:g} there, and evaluate gives {found:g}. Take another storage= for another task; if evaluate "
            f"draws at random, let it start from one seed."
        )
