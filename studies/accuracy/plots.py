"""The plots of the runs: accuracy against trainable parameters, and against the learning rate.

Methods of about one size stand beside each other, each a little to the right of its number. Bars are 95% t intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies.accuracy.runs import PROBE, Run
from studies.accuracy.tables import Tests, interval, tested_at
from benchmarks.peers import needs

# By the longest start of a method's name: a family's colour (Okabe and Ito's, which the colour-blind tell apart), a
# marker, and how much of it is filled.
_STYLES: dict[str, tuple[str, str, str]] = {
    "GLoRA r3": ("#D55E00", "o", "full"),
    "GLoRA r3,": ("#D55E00", "o", "left"),
    "GLoRA r1": ("#D55E00", "o", "none"),
    "GLoRA A vector": ("#D55E00", "h", "none"),
    "GLoRA vectors": ("#D55E00", "d", "none"),
    "GLoRA constants": ("#D55E00", "x", "full"),
    "LoRA r8": ("#0072B2", "D", "full"),
    "LoRA r3": ("#0072B2", "D", "left"),
    "LoRA r1": ("#0072B2", "D", "none"),
    "HiRA": ("#E69F00", "s", "full"),
    "RepAdapter": ("#F0E442", "p", "full"),
    "SSF": ("#009E73", "^", "full"),
    "IA3": ("#56B4E9", "v", "full"),
    "BitFit": ("#999999", "<", "full"),
    "PEFT GLoRA": ("#CC79A7", "X", "full"),
    "PEFT LoRA": ("#CC79A7", "P", "full"),
    "full": ("#000000", "*", "full"),
}
_SHOWN = 30.0  # points below the best that a learning rate's accuracy is shown to
_RANGE = 1e4, 4e7  # of parameters, the same in each panel
_APART = 1.12  # ratio of the places of two methods, so that each interval is seen


def _style(method: str) -> dict[str, str]:
    start = max((name for name in _STYLES if method.startswith(name)), key=len)
    color, marker, filled = _STYLES[start]
    return {"color": color, "marker": marker, "fillstyle": filled}


def plots(runs: Sequence[Run], folder: Path) -> None:
    """Draw `accuracy-parameters.png` and `accuracy-rates.png`."""
    tests = Tests.of(runs)
    panels = {task: [task] for task in tests.tasks}
    panels |= {f"mean of {', '.join(tasks)}\n(methods run on each)": tasks for tasks in tests.alike}
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
    last = 0.0
    for method in reversed(tests.methods(tasks)):
        found = interval([[tested_at(run) for run in tests.tested[task, method].values()] for task in tasks])
        if found is None or "," in method or "without" in method:
            continue
        middle, low, high = found
        if method == PROBE:
            axis.axhline(middle, color="grey", linestyle="--", label=PROBE)
            continue
        error = [[middle - low], [high - middle]]
        last = max(tests.trainable(tasks[0], method), last * _APART)
        axis.errorbar(
            [last], [middle], yerr=error, linestyle="none", capsize=2, linewidth=1, label=method, **_style(method)
        )
    axis.set_xscale("log")
    axis.set_xlim(_RANGE)


def _rates(axis: Any, tests: Tests, task: str) -> None:
    methods = dict.fromkeys(run.method for run in tests.choosing if run.task == task)
    best = 0.0
    for method in methods:
        means = tests.validation(task, method)
        if not means:
            continue
        dashes = ":" if "," in method else "-"
        best = max(best, *means.values())
        axis.plot(list(means), list(means.values()), linestyle=dashes, label=method, **_style(method))
    axis.set_xscale("log")
    if best:
        axis.set_ylim(best - _SHOWN, best + 2)


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
