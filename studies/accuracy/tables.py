"""Tables and plots of the runs in `accuracy.csv`: `python -m studies.accuracy --report`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev, variance

from scipy import stats

from studies.accuracy.data import TASKS
from studies.accuracy.methods import METHODS
from studies.accuracy.runs import LEARNING_RATES, PROBE, Run
from benchmarks.report import read_csv

# The LoRA that a method of this budget is compared with; without a budget, or before it is run: the first one.
LORAS = {"1.5%": "LoRA r8", "0.5%": "LoRA r3", "0.2%": "LoRA r1", "0.05%": "LoRA r1, query and value"}
LORA = "LoRA r8"
PLATEAU = 2.0  # points below the best validation accuracy at most

Interval = tuple[float, float, float]  # middle, low, high


@dataclass(frozen=True)
class Tests:
    """Test runs by task, method and seed; and those of the choice."""

    tested: Mapping[tuple[str, str], Mapping[int, Run]]
    choosing: Sequence[Run]

    @classmethod
    def of(cls, runs: Iterable[Run]) -> Tests:
        """Sorted; where more seeds have led to another choice of the learning rate, the last choice alone."""
        runs = list(runs)
        last = {(run.task, run.method): run.lr for run in runs if run.stage == "test" and run.method != PROBE}
        tested: dict[tuple[str, str], dict[int, Run]] = {}
        for run in runs:
            key = run.task, run.method
            if run.stage == "test" and run.lr == last.get(key, run.lr):
                tested.setdefault(key, {})[run.seed] = run
        return cls(tested, [run for run in runs if run.stage == "choose"])

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for task, _ in self.tested))

    @property
    def alike(self) -> list[list[str]]:
        """The tasks of each model that has two or more: a mean over models would be over unlike sizes."""
        by_model: dict[str, list[str]] = {}
        for task in self.tasks:
            by_model.setdefault(TASKS[task].model, []).append(task)
        return [tasks for tasks in by_model.values() if len(tasks) > 1]

    def methods(self, tasks: Sequence[str]) -> list[str]:
        """Those that have two seeds at least on all of these tasks, the most parameters first."""
        names = dict.fromkeys(method for _, method in self.tested)
        whole = [name for name in names if all(len(self.tested.get((task, name), {})) > 1 for task in tasks)]
        return sorted(whole, key=lambda name: -self.trainable(tasks[0], name))

    def missing(self, tasks: Sequence[str]) -> dict[str, list[str]]:
        """The other methods, and the tasks of these that each has no two seeds on."""
        names = dict.fromkeys(method for task, method in self.tested if task in tasks)
        found = {name: [task for task in tasks if len(self.tested.get((task, name), {})) < 2] for name in names}
        return {name: absent for name, absent in found.items() if absent}

    def chosen_on(self, task: str, method: str) -> list[int]:
        """The seeds that each learning rate was tried with."""
        mine = [run for run in self.choosing if (run.task, run.method) == (task, method)]
        return sorted(set.intersection(*({run.seed for run in mine if run.lr == lr} for lr in LEARNING_RATES)))

    def validation(self, task: str, method: str) -> dict[float, float]:
        """Each learning rate's mean validation accuracy, over equal seeds; empty where not all of them were tried."""
        seeds, found = self.chosen_on(task, method), {(r.task, r.method, r.lr, r.seed): r for r in self.choosing}
        if not seeds:
            return {}
        return {lr: fmean(found[task, method, lr, seed].validation for seed in seeds) for lr in LEARNING_RATES}

    def trainable(self, task: str, method: str) -> int:
        return next(iter(self.tested[task, method].values())).trainable

    def differences(self, task: str, method: str, other: str) -> list[float]:
        """Test accuracy less the other method's, of each seed that both have."""
        mine, theirs = self.tested[task, method], self.tested[task, other]
        return [tested_at(mine[seed]) - tested_at(theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]

    def against(self, tasks: Sequence[str], method: str) -> str:
        """The LoRA to compare with."""
        near = LORAS.get(METHODS[method].budget, LORA) if method in METHODS else LORA
        return near if near in self.methods(tasks) else LORA


def tested_at(run: Run) -> float:
    """Its test accuracy."""
    assert run.test is not None
    return run.test


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
    freedom = sum(len(values) - 1 for values in strata)
    if not freedom or min(map(len, strata)) < 1:
        return None
    pooled = sum((len(values) - 1) * variance(values) for values in strata if len(values) > 1) / freedom
    middle = fmean(fmean(values) for values in strata)
    error = (pooled * sum(1 / len(values) for values in strata)) ** 0.5 / len(strata)
    half = float(stats.t.ppf(0.975, freedom)) * error
    return middle, middle - half, middle + half


def task_rows(tests: Tests, task: str) -> list[dict[str, str]]:
    """One row a method, of one task."""
    rows: list[dict[str, str]] = []
    for method in tests.methods([task]):
        runs = list(tests.tested[task, method].values())
        scores = [tested_at(run) for run in runs]
        rows.append(
            {
                "method": method,
                "trainable": f"{runs[0].trainable:,}",
                "learning rate (seeds)": _rate(tests, runs[0]),
                "test accuracy": f"{fmean(scores):.1f} +- {stdev(scores):.1f}",
                "seeds": str(len(scores)),
                **_compared(tests, [task], method),
                "CPU s": f"{fmean(run.cpu_s for run in runs):.0f}",
            }
        )
    return rows


def _rate(tests: Tests, run: Run) -> str:
    """The learning rate, and on how many seeds' validation sets it was chosen."""
    if run.method == PROBE:
        return ""
    seeds = len(tests.chosen_on(run.task, run.method))
    return f"{run.lr:g} ({seeds or 'given'})"


def mean_rows(tests: Tests, tasks: Sequence[str]) -> list[dict[str, str]]:
    """One row a method that has two seeds at least on each of these tasks: the mean over them."""
    rows: list[dict[str, str]] = []
    for method in tests.methods(tasks):
        scores = [fmean(tested_at(run) for run in tests.tested[task, method].values()) for task in tasks]
        row = {"method": method, "trainable": f"{tests.trainable(tasks[0], method):,}"}
        row |= {"mean test accuracy": f"{fmean(scores):.1f}"} | _compared(tests, tasks, method)
        rows.append(row | dict(zip(tasks, [f"{score:.1f}" for score in scores], strict=True)))
    return rows


def _compared(tests: Tests, tasks: Sequence[str], method: str) -> dict[str, str]:
    other = tests.against(tasks, method)
    found = None
    if other != method and all((task, other) in tests.tested for task in tasks):
        found = interval([tests.differences(task, method, other) for task in tasks])
    if found is None:
        return {"difference to LoRA (95%)": "", "which": ""}
    return {"difference to LoRA (95%)": f"{found[0]:+.1f} [{found[1]:+.1f}, {found[2]:+.1f}]", "which": other}


def rate_rows(tests: Tests) -> list[dict[str, str]]:
    """Validation accuracy at each learning rate, and how many rates are within two points of the best."""
    rows: list[dict[str, str]] = []
    for task, method in dict.fromkeys((run.task, run.method) for run in tests.choosing):
        if means := tests.validation(task, method):
            good = [lr for lr in means if means[lr] >= max(means.values()) - PLATEAU]
            row = {"task": task, "method": method} | {f"{lr:g}": f"{mean:.1f}" for lr, mean in means.items()}
            row |= {"seeds": str(len(tests.chosen_on(task, method)))}
            rows.append(row | {"within 2 points": ", ".join(f"{lr:g}" for lr in good)})
    return sorted(rows, key=lambda row: (row["task"], row["method"]))


def markdown(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Print a table that a README can take."""
    if not rows:
        return
    columns = list(rows[0])
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row[column] for column in columns)} |")


def tables(runs: Sequence[Run], memory: Path) -> None:
    """Print all tables."""
    tests = Tests.of(runs)
    for task in tests.tasks:
        title = f"{task}: test accuracy in percent, mean and standard deviation over seeds"
        markdown(f"{title}; in brackets, the seeds that chose the learning rate", task_rows(tests, task))
    for tasks in tests.alike:
        markdown(f"Mean over {', '.join(tasks)}, of the methods run on each", mean_rows(tests, tasks))
        absent = [f"{name} ({', '.join(without)})" for name, without in tests.missing(tasks).items()]
        print(f"\nNot in this table, for want of runs on a task: {'; '.join(absent) or 'none'}.")
    markdown("Validation accuracy by learning rate", rate_rows(tests))
    if memory.exists():
        markdown("Peak memory of a training step, 32 texts of 32 tokens", read_csv(memory))
