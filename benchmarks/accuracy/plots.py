"""The plots of the runs: accuracy against trainable parameters, and against the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.accuracy.runs import LEARNING_RATES, PROBE, Run
from benchmarks.accuracy.tables import Tests, interval, tested_at
from benchmarks.peers import needs

# Families by colour (Okabe and Ito's, which the colour-blind tell apart) and marker.
_FAMILIES: dict[str, tuple[str, str]] = {
    "GLoRA": ("#D55E00", "o"),
    "LoRA": ("#0072B2", "D"),
    "HiRA": ("#E69F00", "s"),
    "RepAdapter": ("#F0E442", "p"),
    "SSF": ("#009E73", "^"),
    "IA3": ("#56B4E9", "v"),
    "BitFit": ("#999999", "<"),
    "PEFT GLoRA": ("#CC79A7", "X"),
    "PEFT LoRA": ("#CC79A7", "P"),
    "full": ("#000000", "*"),
}


def _style(method: str) -> tuple[str, str]:
    family = max((name for name in _FAMILIES if method.startswith(name)), key=len)
    return _FAMILIES[family]


def plots(runs: Sequence[Run], folder: Path) -> None:
    """Draw `accuracy-parameters.png` and `accuracy-rates.png`."""
    tests = Tests.of(runs)
    panels = {task: [task] for task in tests.tasks}
    if len(tests.tasks) > 1:
        panels |= {f"mean of {len(tests.tasks)} tasks": tests.tasks}
    figure, axes = _figure(len(panels))
    for axis, (title, tasks) in zip(axes, panels.items(), strict=True):
        _parameters(axis, tests, tasks)
        axis.set_title(title)
    _finish(
        figure, axes, "trainable parameters (without the head)", "test accuracy (%)", folder / "accuracy-parameters.png"
    )

    chosen = sorted({run.task for run in tests.choosing}, key=tests.tasks.index)
    if chosen:
        figure, axes = _figure(len(chosen))
        for axis, task in zip(axes, chosen, strict=True):
            _rates(axis, tests, task)
            axis.set_title(task)
        _finish(figure, axes, "learning rate", "validation accuracy (%)", folder / "accuracy-rates.png")


def _parameters(axis: Any, tests: Tests, tasks: Sequence[str]) -> None:
    for method in tests.methods(tasks):
        found = interval([[tested_at(run) for run in tests.tested[task, method].values()] for task in tasks])
        if found is None or "," in method or "without" in method:
            continue
        middle, low, high = found
        if method == PROBE:
            axis.axhline(middle, color="grey", linestyle="--", label=PROBE)
            continue
        color, marker = _style(method)
        error = [[middle - low], [high - middle]]
        x = tests.trainable(tasks[0], method)
        axis.errorbar([x], [middle], yerr=error, fmt=marker, color=color, capsize=2, linewidth=1, label=method)
    axis.set_xscale("log")


def _rates(axis: Any, tests: Tests, task: str) -> None:
    methods = dict.fromkeys(run.method for run in tests.choosing if run.task == task)
    for method in methods:
        by_rate: dict[float, list[float]] = {}
        for run in tests.choosing:
            if (run.task, run.method) == (task, method):
                by_rate.setdefault(run.lr, []).append(run.validation)
        if not set(LEARNING_RATES) <= by_rate.keys():
            continue
        color, marker = _style(method)
        dashes = ":" if "," in method else "-"
        means = [fmean(by_rate[lr]) for lr in LEARNING_RATES]
        axis.plot(LEARNING_RATES, means, dashes, color=color, marker=marker, label=method)
    axis.set_xscale("log")


def _figure(count: int) -> tuple[Any, Sequence[Any]]:
    needs("matplotlib").use("Agg")
    figure, axes = needs("matplotlib.pyplot").subplots(
        1, count, figsize=(3.6 * count, 4.6), squeeze=False, layout="constrained"
    )
    return figure, axes[0]


def _finish(figure: Any, axes: Sequence[Any], x: str, y: str, path: Path) -> None:
    axes[0].set_ylabel(y)
    for axis in axes:
        axis.set_xlabel(x)
        axis.grid(alpha=0.3)
    labels: dict[str, Any] = {}
    for axis in axes:
        handles, names = axis.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
    needs("matplotlib.pyplot").close(figure)
    print(f"wrote {path}")
