"""The runs: which are wanted, and what makes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from studies.accuracy import text, vision
from studies.accuracy.data import TASKS, splits
from studies.accuracy.methods import Method
from studies.accuracy.model import EPOCHS, Encoded, Pretrained, accuracy, train

MODELS: dict[str, Callable[[], Pretrained]] = {"text": text.pretrained, "vision": vision.pretrained}

# A factor of 2 apart; the one that is best on the validation sets of the first seeds counts. Where that is
# the lowest or the highest, the next one is tried too, at most twice on each side.
LEARNING_RATES = (2e-3, 4e-3, 8e-3)
BEYOND = 2
CHOOSING = 2
LOWER = {"full fine-tuning": 0.05}  # methods whose rates are another multiple


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
    """Makes the runs of a task; `sizes` are those of its training, validation and test examples."""

    def __init__(self, task: str, sizes: tuple[int, int, int], epochs: int = EPOCHS) -> None:
        self.task, self.sizes, self.epochs = task, sizes, epochs
        self._pretrained: Pretrained | None = None
        self._sets: dict[int, _Sets] = {}

    def run(self, name: str, method: Method, seed: int, lr: float) -> Run:
        """Train a copy of the model, and measure it on both held-out sets."""
        pretrained, sets = self._of(seed)
        model = pretrained.classifier(sets.classes, seed)
        groups = method(model)
        losses, seconds = train(model, groups, sets.train, lr=lr, seed=seed, epochs=self.epochs)
        trainable = sum(p.numel() for group in groups for p in group.parameters)
        examples, loss, found = self.sizes[0], fmean(losses[-5:]), [accuracy(model, sets.validation)]
        found.append(accuracy(model, sets.test))
        return Run(self.task, name, seed, lr, examples, self.epochs, trainable, seconds, loss, *found)

    def _of(self, seed: int) -> tuple[Pretrained, _Sets]:
        if self._pretrained is None:
            self._pretrained = MODELS[TASKS[self.task].model]()
        if seed not in self._sets:
            parts = splits(self.task, seed, self.sizes)
            encoded = [self._pretrained.encode(part) for part in (parts.train, parts.validation, parts.test)]
            self._sets = {seed: _Sets(parts.classes, *encoded)}
        return self._pretrained, self._sets[seed]


def rates(runs: Sequence[Run], task: str, method: str) -> list[float]:
    """The learning rates that a method is to be tried with, as far as these runs show, from low to high."""
    tried = [lr * LOWER.get(method, 1.0) for lr in LEARNING_RATES]
    lowest, highest = tried[0] / 2**BEYOND, tried[-1] * 2**BEYOND
    while (best := _best(runs, task, method, tried)) is not None:
        if best == tried[0] > lowest:
            tried.insert(0, best / 2)
        elif best == tried[-1] < highest:
            tried.append(best * 2)
        else:
            break
    return tried


def chosen_rate(runs: Sequence[Run], task: str, method: str) -> float | None:
    """The learning rate of the best mean validation accuracy over the seeds that choose, the lower of two equals.

    None before each rate was tried with each of them.
    """
    return _best(runs, task, method, rates(runs, task, method))


def _best(runs: Sequence[Run], task: str, method: str, tried: Sequence[float]) -> float | None:
    found: Mapping[tuple[float, int], float] = {
        (run.lr, run.seed): run.validation for run in runs if (run.task, run.method) == (task, method)
    }
    means: dict[float, float] = {}
    for lr in tried:
        scores = [found[lr, seed] for seed in range(CHOOSING) if (lr, seed) in found]
        if len(scores) < CHOOSING:
            return None
        means[lr] = fmean(scores)
    return max(means, key=lambda lr: (means[lr], -lr))


def wanted(
    runs: Sequence[Run], tasks: Sequence[str], methods: Sequence[str], seeds: int
) -> Iterator[tuple[str, str, int, float]]:
    """Task, method, seed and learning rate of the runs that are still to be made, in their order.

    First those that choose; then one seed of every task and method after the other, so that what is there at any time
    compares like with like. It is asked anew after each run: what is best so far may ask for another rate.
    """
    done = {(run.task, run.method, run.seed, run.lr) for run in runs}
    for task in tasks:
        for method in methods:
            for lr in rates(runs, task, method):
                for seed in range(min(CHOOSING, seeds)):
                    if (task, method, seed, lr) not in done:
                        yield task, method, seed, lr
    for seed in range(seeds):
        for task in tasks:
            for method in methods:
                lr = chosen_rate(runs, task, method)
                if lr is not None and (task, method, seed, lr) not in done:
                    yield task, method, seed, lr


def runs_at_chosen_rate(runs: Sequence[Run], task: str, method: str) -> dict[int, Run]:
    """Seed to run, at the learning rate that was chosen; empty before it is."""
    lr = chosen_rate(runs, task, method)
    return {run.seed: run for run in runs if (run.task, run.method, run.lr) == (task, method, lr)}
