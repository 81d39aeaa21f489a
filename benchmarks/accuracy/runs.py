"""The runs, and the file that remembers them, a line each: a second call goes on where the first one stopped."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from benchmarks.accuracy import text, vision
from benchmarks.accuracy.data import TASKS, Splits, splits
from benchmarks.accuracy.methods import Method
from benchmarks.accuracy.model import EPOCHS, Classifier, Encoded, Pretrained, accuracy, features, train

MODELS: dict[str, Callable[[], Pretrained]] = {"text": text.pretrained, "vision": vision.pretrained}

# One grid for all: full fine-tuning wants the low end, vectors the high one.
LEARNING_RATES = (2e-4, 1e-3, 5e-3, 2.5e-2)
PROBE = "linear probe"


@dataclass(frozen=True)
class Run:
    """One line of the file.

    Attributes:
        stage: "choose" reads the validation set alone; "test" is the one run whose test set is read.
        lr: the learning rate; the probe's C.
        trainable: numbers that train, without the head's.
        cpu_s: seconds of the processor in training, which other programs beside it change least.
        loss: mean of the last five steps.
        validation: accuracy in percent.
        test: accuracy in percent; None where stage is "choose".
    """

    task: str
    method: str
    stage: Literal["choose", "test"]
    seed: int
    lr: float
    epochs: int
    examples: int
    trainable: int
    cpu_s: float
    loss: float
    validation: float
    test: float | None = None


@dataclass(frozen=True)
class _Sets:
    splits: Splits
    train: Encoded
    validation: Encoded
    test: Encoded


class Runs:
    """The file: what it holds is not run again."""

    def __init__(self, path: Path, about: str) -> None:
        self.path = path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# {about}\n{_line([field.name for field in fields(Run)])}")
        elif not (held := path.read_text()).endswith("\n"):
            path.write_text(held[: held.rfind("\n") + 1])  # a line that was cut off while it was written

    def add(self, run: Run) -> None:
        # One write of one line, at the end: two processes with different tasks may share the file.
        cells = [f"{value:.6g}" if isinstance(value, float) else value for value in asdict(run).values()]
        with self.path.open("a") as file:
            file.write(_line(cells))

    def read(self) -> list[Run]:
        return read(self.path)


def read(path: Path) -> list[Run]:
    """All runs of a file."""
    rows = csv.DictReader(path.read_text().splitlines()[1:])
    return [_parse(row) for row in rows]


def _parse(row: Mapping[str, str]) -> Run:
    values = {field.name: row[field.name] for field in fields(Run)}
    whole = {name: int(values.pop(name)) for name in ("seed", "epochs", "examples", "trainable")}
    words = {name: values.pop(name) for name in ("task", "method", "stage")}
    test = values.pop("test")
    return Run(**words, **whole, **{k: float(v) for k, v in values.items()}, test=float(test) if test else None)


def _line(cells: Sequence[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(["" if cell is None else cell for cell in cells])
    return line.getvalue()


class Trainer:
    """Makes the runs of a task."""

    def __init__(self, task: str, sizes: tuple[int, int, int], epochs: int = EPOCHS) -> None:
        self.task, self.sizes, self.epochs = task, sizes, epochs
        self.pretrained = MODELS[TASKS[task].model]()
        self._sets: dict[int, _Sets] = {}

    def sets(self, seed: int) -> _Sets:
        if seed not in self._sets:
            parts = splits(self.task, seed, self.sizes)
            encoded = [self.pretrained.encode(part) for part in (parts.train, parts.validation, parts.test)]
            self._sets[seed] = _Sets(parts, *encoded)
        return self._sets[seed]

    def train(self, name: str, method: Method, seed: int, lr: float) -> tuple[Run, Classifier]:
        sets = self.sets(seed)
        model = self.pretrained.classifier(sets.splits.classes, seed)
        groups = method.attach(model)
        losses, seconds = train(model, groups, sets.train, lr=lr, seed=seed, epochs=self.epochs)
        trainable = sum(p.numel() for group in groups for p in group.parameters)
        last, validation = fmean(losses[-5:]), accuracy(model, sets.validation)
        run = Run(self.task, name, "choose", seed, lr, self.epochs, self.sizes[0], trainable, seconds, last, validation)
        return run, model

    def probe(self, seed: int) -> Run:
        """Logistic regression on the frozen features; its C is chosen on the validation set."""
        sets = self.sets(seed)
        model = self.pretrained.classifier(sets.splits.classes, seed).eval()
        x, held, test = (features(model, each).numpy() for each in (sets.train, sets.validation, sets.test))
        y, held_y, test_y = (np.array(each.labels) for each in (sets.train, sets.validation, sets.test))
        probes = {
            c: make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000)).fit(x, y)
            for c in [10.0**power for power in range(-4, 3)]
        }
        scores = {c: 100 * float(probe.score(held, held_y)) for c, probe in probes.items()}
        c = max(scores, key=lambda each: scores[each])
        found = 100 * float(probes[c].score(test, test_y))
        return Run(self.task, PROBE, "test", seed, c, 0, self.sizes[0], 0, 0.0, 0.0, scores[c], found)


@dataclass(frozen=True)
class Plan:
    """Which runs are wanted: on the first `choosing` seeds the learning rate is chosen, on the first `seeds` tested."""

    seeds: int = 3
    choosing: int = 3
    rates: tuple[float, ...] = LEARNING_RATES


def chosen_rate(runs: Sequence[Run], task: str, method: str, plan: Plan) -> float | None:
    """The learning rate with the best mean validation accuracy, the lower of two equals; None before all are run."""
    scores = {
        (run.lr, run.seed): run.validation
        for run in runs
        if (run.task, run.method, run.stage) == (task, method, "choose")
    }
    wanted = {lr: [scores.get((lr, seed)) for seed in range(plan.choosing)] for lr in plan.rates}
    means = {lr: fmean(s for s in found if s is not None) for lr, found in wanted.items() if None not in found}
    return max(plan.rates, key=lambda lr: (means[lr], -lr)) if len(means) == len(wanted) else None


def run_method(
    trainer: Trainer, name: str, method: Method, plan: Plan, store: Runs, bar: tqdm[object], lr: float | None = None
) -> None:
    """All runs of a method that the file does not hold: choosing the learning rate (if not given), the tests."""
    held: dict[tuple[int, float], tuple[Run, Classifier]] = {}
    done = {(r.stage, r.seed, r.lr) for r in store.read() if (r.task, r.method) == (trainer.task, name)}
    if lr is None:
        for seed in range(plan.choosing):
            for rate in plan.rates:
                if ("choose", seed, rate) not in done:
                    bar.set_description(f"{trainer.task}, {name}, seed {seed}, lr {rate:g}")
                    held[seed, rate] = trainer.train(name, method, seed, rate)
                    store.add(held[seed, rate][0])
                bar.update()
        lr = chosen_rate(store.read(), trainer.task, name, plan)
        assert lr is not None
    for seed in range(plan.seeds):
        if ("test", seed, lr) not in done:
            bar.set_description(f"{trainer.task}, {name}, seed {seed}, test")
            # What the choice has trained with this seed and rate need not be trained again.
            run, model = held.get((seed, lr)) or trainer.train(name, method, seed, lr)
            tested = accuracy(model, trainer.sets(seed).test)
            store.add(Run(**asdict(run) | {"stage": "test", "test": tested}))
        bar.update()
