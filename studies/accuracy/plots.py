"""The plot of the runs: each method's difference to LoRA, task by task and in the mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers import needs
from benchmarks.report import save_figure
from studies.accuracy.runs import Run
from studies.accuracy.tables import LORA, LORAS, differences, interval


def plot(runs: Sequence[Run], tasks: Sequence[str], methods: Sequence[str], path: Path) -> None:
    """Draw the differences with their 95% intervals."""
    others = [method for method in methods if method not in (LORA, *LORAS.values())]
    others = [method for method in others if all(differences(runs, task, method) for task in tasks)]
    if not others:
        return
    needs("matplotlib").use("Agg")
    panels = [[task] for task in tasks] + ([list(tasks)] if len(tasks) > 1 else [])
    figure, axes = needs("matplotlib.pyplot").subplots(
        1,
        len(panels),
        figsize=(2.6 * len(panels) + 2, 0.5 * len(others) + 1.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        for place, method in enumerate(others):
            found = interval([differences(runs, task, method) for task in panel])
            if found is not None:
                middle, low, high = found
                axis.errorbar(
                    [middle], [place], xerr=[[middle - low], [high - middle]], fmt="o", capsize=3, color="#0072B2"
                )
        axis.axvline(0, color="grey", linestyle="--")
        axis.set_title(panel[0] if len(panel) == 1 else "mean of these")
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(others)), others)
    axes[0][0].invert_yaxis()
    figure.suptitle("Right of the line: more accurate than LoRA of equal size (points of test accuracy, 95%)")
    save_figure(figure, path)
