"""Tables of the runs: accuracy, and paired differences to LoRA with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, variance

from scipy import stats

from studies.accuracy.runs import Run, runs_at_chosen_rate

Interval = tuple[float, float, float]  # middle, low, high

# What a method is compared with: the LoRA of equal parameters.
LORA = "LoRA r8"
LORAS = {"A r2": "LoRA r2"}


def interval(strata: Sequence[Sequence[float]]) -> Interval | None:
    """The mean of the strata's means, and its 95% t interval with a variance common to all strata.

    A stratum is a task; its values are one difference a seed. The interval is that of these tasks with other seeds: it
    says nothing of other tasks. None where no stratum has two values.

    Example:
        >>> [round(x, 2) for x in interval([[0.0, 1.0, 2.0]])]
        [1.0, -1.48, 3.48]
        >>> [round(x, 2) for x in interval([[0.0, 1.0, 2.0], [4.0, 5.0, 6.0]])]
        [3.0, 1.87, 4.13]
    """
    if not strata or min(map(len, strata)) < 1:
        return None
    freedom = sum(len(values) - 1 for values in strata)
    if not freedom:
        return None
    pooled = sum((len(values) - 1) * variance(values) for values in strata if len(values) > 1) / freedom
    middle = fmean(fmean(values) for values in strata)
    error = (pooled * sum(1 / len(values) for values in strata)) ** 0.5 / len(strata)
    half = float(stats.t.ppf(0.975, freedom)) * error
    return middle, middle - half, middle + half


def differences(runs: Sequence[Run], task: str, method: str) -> list[float]:
    """Test accuracy less that of the LoRA of equal parameters, of each seed that both have."""
    mine, theirs = runs_at_chosen_rate(runs, task, method), runs_at_chosen_rate(runs, task, LORAS.get(method, LORA))
    return [mine[seed].test - theirs[seed].test for seed in sorted(mine.keys() & theirs.keys())]


def row(runs: Sequence[Run], tasks: Sequence[str], method: str) -> dict[str, str] | None:
    """A method's row; None where a task has no run of it. Each mean is over the seeds that LoRA has too."""
    found = [runs_at_chosen_rate(runs, task, method) for task in tasks]
    if not all(found):
        return None
    cells = {"method": method, "trainable": f"{next(iter(found[0].values())).trainable:,}"}
    cells["mean"] = f"{fmean(fmean(run.test for run in each.values()) for each in found):.1f}"
    apart = interval([differences(runs, task, method) for task in tasks])
    is_reference = method in (LORA, *LORAS.values())
    cells["less LoRA (95%)"] = "" if is_reference or apart is None else _text(apart)
    for task, each in zip(tasks, found, strict=True):
        cells[task] = f"{fmean(run.test for run in each.values()):.1f}"
    cells["rates"] = ", ".join(f"{next(iter(each.values())).lr:g}" for each in found)
    cells["seeds"] = "-".join(map(str, sorted({len(each) for each in found})))
    cells["CPU s"] = f"{fmean(run.cpu_s for each in found for run in each.values()):.0f}"
    return cells


def _text(apart: Interval) -> str:
    return f"{apart[0]:+.1f} [{apart[1]:+.1f}, {apart[2]:+.1f}]"


def rows(runs: Sequence[Run], tasks: Sequence[str], methods: Sequence[str]) -> list[dict[str, str]]:
    """One row a method that has runs on each of the tasks."""
    return [found for method in methods if (found := row(runs, tasks, method)) is not None]


def markdown(title: str, table: Sequence[dict[str, str]]) -> None:
    """Print a table that a page can take."""
    if not table:
        return
    columns = list(table[0])
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for cells in table:
        print(f"| {' | '.join(cells[column] for column in columns)} |")
