"""The search for the best choice, through optuna."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

from glora.config import GLoRAConfig
from glora.files.container import import_optional
from glora.model.walk import Model
from glora.search.choices import complete, layers_of, switch
from glora.search.genes import Genes
from glora.search.result import Result, result_of

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
    (Note [Under the budget]). The same arguments on the same storage go on with the same study: after an interruption,
    as if there had been none, or in several processes at once, on one machine or many. A trial that a killed process of
    this machine left is made again (Note [Abandoned trials]).

    Args:
        model: the model, with a trained supernet.
        evaluate: the score of the model as it is then switched, to be maximised. Give it data that neither trained the
            model nor will test it. One that raises, or gives no finite number, costs that trial alone.
        budget: the most trainable parameters, heads left out: they are the same in every choice. None searches for both
            a high score and few parameters.
        trials: evaluations in all, those found in the storage included; fewer where the space has no more choices.
        sampler: `"nsga2"` (evolution with the paper's population of 50, uniform crossover and mutation 0.2), or as a
            baseline `"random"`.
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
    if sampler not in get_args(_Sampler) or type(trials) is not int or trials < 1:
        raise ValueError(
            f"sampler must be one of {', '.join(get_args(_Sampler))} and trials an int of at least 1; found "
            f"{sampler!r} and {trials!r}."
        )
    import_optional("optuna", "search")
    tqdm = import_optional("tqdm", "search").tqdm
    from glora.search.study import evaluated, make, next_trial, open_study

    def score(configs: Mapping[str, GLoRAConfig]) -> float:
        switch(layers, configs)
        return float(evaluate(model))

    study = open_study(genes, sampler, seed, storage)
    before = {path: layer.parts[0].chosen for path, layer in layers.items()}
    try:
        with tqdm(total=trials, desc="glora.search", disable=None) as bar:
            while (trial := next_trial(study, trials)) is not None and make(study, trial, genes, score):
                bar.update()
        result = result_of(evaluated(study, genes))
    except BaseException:
        switch(layers, before)
        raise
    switch(layers, complete(layers, result.targets))
    return result
