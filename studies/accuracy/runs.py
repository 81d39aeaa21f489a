"""The runs: which are wanted, and what makes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from studies.accuracy import text, vision
from studies.accuracy.data import TASKS, splits
from studies.accuracy.methods import Method
from studies.accuracy.model import EPOCHS, Encoded, Pretrained, accuracy, train

MODELS: dict[str, Callable[[], Pretrained]] = {"text": text.pretrained, "vision": vision.pretrained}

# A factor of 2 apart. These first; then beyond the end that is best, until the best has a worse one on either side.
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
STEP = 2.0
CHOOSING = 2  # seeds


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        trainable: numbers that train, without the head's.
        cpu_s: seconds of the processor in training, which other programs beside it change least.
        loss: mean of the last five steps.
        validation: accuracy in percent; the learning rate is chosen by it alone.
        test: accuracy in percent.
    """

    task: str
    method: str
    seed: int
    lr: float
    examples: int
    epochs: int
    trainable: int
    cpu_s: float
    loss: float
    validation: float
    test: float


@dataclass(frozen=True)
class _Sets:
    classes: int
    train: Encoded
    validation: Encoded
    test: Encoded


class Trainer:
    """Makes the runs of a task."""

    def __init__(self, task: str, sizes: tuple[int, int, int], epochs: int = EPOCHS) -> None:
        self.task, self.sizes, self.epochs = task, sizes, epochs
        self._pretrained: Pretrained | None = None
        self._sets: dict[int, _Sets] = {}

    def _of(self, seed: int) -> tuple[Pretrained, _Sets]:
        if self._pretrained is None:
            self._pretrained = MODELS[TASKS[self.task].model]()
        if seed not in self._sets:
            parts = splits(self.task, seed, self.sizes)
            encoded = [self._pretrained.encode(part) for part in (parts.train, parts.validation, parts.test)]
            self._sets = {seed: _Sets(parts.classes, *encoded)}
        return self._pretrained, self._sets[seed]

    def run(self, name: str, method: Method, seed: int, lr: float) -> Run:
        """Train a copy of the model, and read both sets."""
        pretrained, sets = self._of(seed)
        model = pretrained.classifier(sets.classes, seed)
        groups = method.attach(model)
        losses, seconds = train(model, groups, sets.train, lr=lr, seed=seed, epochs=self.epochs)
        trainable = sum(p.numel() for group in groups for p in group.parameters)
        found = accuracy(model, sets.validation), accuracy(model, sets.test)
        examples = self.sizes[0]
        return Run(
            self.task, name, seed, lr, examples, self.epochs, trainable, seconds, fmean(losses[-5:]), *found
        )


def next_rate(scores: dict[float, float]) -> float | None:
    """The learning rate that is to be tried next, given the scores of others; None where the best is bracketed.

    Example:
        >>> next_rate({1e-3: 70.0, 2e-3: 71.0, 4e-3: 72.0})
        0.008
        >>> next_rate({1e-3: 70.0, 2e-3: 72.0, 4e-3: 71.0}) is None
        True
    """
    for lr in LEARNING_RATES:
        if lr not in scores:
            return lr
    best = best_rate(scores)
    if best == max(scores):
        return best * STEP
    return best / STEP if best == min(scores) else None


def best_rate(scores: dict[float, float]) -> float:
    """The one with the best score; the lower of two equals."""
    return max(sorted(scores), key=lambda lr: scores[lr])


def scores(runs: Sequence[Run], task: str, method: str) -> dict[float, float]:
    """Learning rate to mean validation accuracy, of those that were tried with every seed that chooses."""
    found: dict[float, dict[int, float]] = {}
    for run in runs:
        if (run.task, run.method) == (task, method) and run.seed < CHOOSING:
            found.setdefault(run.lr, {})[run.seed] = run.validation
    return {lr: fmean(each.values()) for lr, each in found.items() if len(each) == CHOOSING}


def chosen_rate(runs: Sequence[Run], task: str, method: str) -> float | None:
    """The learning rate of a method on a task; None before its best is bracketed."""
    found = scores(runs, task, method)
    return best_rate(found) if found and next_rate(found) is None else None


def wanted(runs: Sequence[Run], tasks: Sequence[str], methods: Sequence[str], seeds: int) -> Iterator[tuple[str, str, int, float]]:
    """The runs (task, method, seed, learning rate) to be made next: choices first, then a seed of all at a time."""
    done = {(run.task, run.method, run.seed, run.lr) for run in runs}
    for task in tasks:
        for method in methods:
            lr = next_rate(scores(runs, task, method))
            if lr is not None:
                yield from ((task, method, seed, lr) for seed in range(CHOOSING) if (task, method, seed, lr) not in done)
                return
    for seed in range(seeds):
        for task in tasks:
            for method in methods:
                lr = chosen_rate(runs, task, method)
                if lr is not None and (task, method, seed, lr) not in done:
                    yield task, method, seed, lr
