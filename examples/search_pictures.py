"""Pictures of a search: the score of every trial, and the forms of a choice."""

from __future__ import annotations

import os
from collections.abc import Mapping

from matplotlib.figure import Figure

from glora import GLoRAConfig
from glora.search import Result

# Okabe and Ito's colours, which colour-blind readers can tell apart; the words in the cells say the same.
_COLORS = {"none": "#F0F0F0", "constant": "#F0E442", "vector": "#009E73", "lora": "#0072B2"}


def plot_front(result: Result, file: str | os.PathLike[str]) -> None:
    """Draw the score of every trial against its parameters, and the Pareto front."""
    figure = Figure(figsize=(6, 4), layout="constrained")  # not pyplot, which keeps figures in memory and opens windows
    axes = figure.subplots()
    scored = [trial for trial in result.trials if trial.score is not None]
    order = axes.scatter(
        [t.parameters for t in scored], [t.score for t in scored], c=[t.number for t in scored], s=18, cmap="viridis"
    )
    figure.colorbar(order, label="trial")
    axes.step([t.parameters for t in result.front], [t.score for t in result.front], where="post", color="black")
    axes.plot(result.parameters, result.score, "*", color="#D55E00", markersize=14, label="best")
    axes.set(xlabel="trainable parameters, without heads", ylabel="score")
    axes.legend()
    figure.savefig(file, dpi=150)


def plot_forms(targets: Mapping[str, GLoRAConfig], file: str | os.PathLike[str]) -> None:
    """Draw the form of each path of each layer, with the rank of low-rank ones.

    Args:
        targets: a config for each layer's path, as in a `Result`.
        file: the PNG to write.
    """
    figure = Figure(figsize=(6, 1.2 + 0.22 * len(targets)), layout="constrained")
    axes = figure.subplots()
    for row, config in enumerate(targets.values()):
        for column, form in enumerate(config.forms.values()):
            axes.barh(row, 0.96, left=column - 0.48, height=0.92, color=_COLORS[form])
            words = {"lora": f"lora {config.rank}", "none": ""}.get(form, form)
            dark = form in ("lora", "vector")
            axes.text(column, row, words, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(5), list("ABCDE"))
    axes.set_yticks(range(len(targets)), list(targets), fontsize=7)
    axes.set(xlim=(-0.5, 4.5), ylim=(len(targets) - 0.5, -0.5))
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    figure.savefig(file, dpi=150)
