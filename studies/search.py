"""Does a search for ranks pay, at equal compute? `python -m studies.search`.

A fixed number of parameters (that of LoRA r8 in every layer) is spread over the layers of a text encoder, and a fixed
number of passes is spent on it, whatever spreads it: one pass is an example's way forward, a step of training takes
three of each example.

| method | what the passes go into |
|---|---|
| LoRA r8, longer | one training of 16 epochs |
| best of three | LoRA r8, A r8, and A + B r4, 5 epochs each; the best one on 500 validation examples |
| singular values | a head on frozen features, one pass of full gradients G; then 14 epochs of the ranks found |
| search, trained on | a supernet, 5 epochs; evolution by its likelihood of 100 validation examples; 4 more epochs |
| search, anew | the same, but the last 4 epochs start anew |

Singular values: those of G (for B) and of G * W0 / rms(W0) (for A, which is balanced) in all layers are put in order,
and each of the largest is one more rank for its path and layer, as long as there are parameters left. The search has
A, B, both or none in each layer, with one rank of 2, 4, 8 and 16. A supernet has no balance: its A trains at lr /
rms(W0) instead, which comes to the same.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glora
from benchmarks import report
from benchmarks.peers import needs
from studies.accuracy.data import TASKS, TEST, TRAIN, splits
from studies.accuracy.model import BATCH, HEAD_LR, Classifier, Encoded, Group, accuracy, features, train
from studies.accuracy.runs import MODELS
from studies.accuracy.tables import interval, markdown
from studies.store import RESULTS, Store

LONGER, BEST, SINGULAR = "LoRA r8, longer", "best of three", "singular values"
TRAINED_ON, ANEW = "search, trained on", "search, anew"
LR = 4e-3  # the best of a factor of 2 for LoRA on both tasks (studies.accuracy)
SPACE = glora.search.Space(
    A=["lora", "none"], B=["lora", "none"], C=["none"], D=["none"], E=["none"], ranks=[2, 4, 8, 16]
)
_C = glora.GLoRAConfig
UNIFORM = [_C.lora(rank=8), _C.hira(rank=8), _C(A="lora", B="lora", rank=4)]

Ranks = Mapping[tuple[str, str], int]  # (layer's path, A or B) to rank


@dataclass(frozen=True)
class Size:
    """Examples, epochs and trials: all five methods have as many passes, up to a part of an epoch.

    Attributes:
        validation: examples, of which a trial of the search sees the first `seen`.
        longer: epochs of LoRA alone; the other epochs are named by what is trained.
    """

    train: int = TRAIN
    validation: int = 500
    seen: int = 100
    test: int = TEST
    longer: int = 16
    each: int = 5
    singular: int = 14
    supernet: int = 5
    trials: int = 105
    last: int = 4


QUICK = Size(train=64, validation=64, seen=16, test=64, longer=4, each=1, singular=2, supernet=1, trials=12, last=1)


@dataclass(frozen=True)
class Run:
    """One adapter, found and trained.

    Attributes:
        parameters: numbers that train, without the head's.
        passes: of one example forward, or their equal; with what was spent on finding the adapter.
        test: accuracy in percent.
        cpu_s: seconds of the processor, for the same.
    """

    task: str
    method: str
    seed: int
    parameters: int
    passes: int
    test: float
    cpu_s: float


class Work:
    """The examples and models of one task and seed; counts the passes."""

    def __init__(self, task: str, seed: int, size: Size) -> None:
        self.task, self.seed, self.size = task, seed, size
        self._pretrained = MODELS[TASKS[task].model]()
        parts = splits(task, seed, (size.train, size.validation, size.test))
        self.classes = parts.classes
        self.train_set, self.validation, self.test = map(
            self._pretrained.encode, (parts.train, parts.validation, parts.test)
        )
        self.seen = Encoded(self.validation.inputs[: size.seen], self.validation.labels[: size.seen])
        self.passes = 0
        self.began = time.process_time()

    def classifier(self) -> Classifier:
        return self._pretrained.classifier(self.classes, self.seed)

    def train(self, model: Classifier, groups: Sequence[Group], epochs: int) -> None:
        self.passes += 3 * epochs * len(self.train_set.inputs)
        train(model, groups, self.train_set, lr=LR, seed=self.seed, epochs=epochs)

    def likelihood(self, model: Classifier, encoded: Encoded) -> float:
        """The mean log likelihood: it tells models apart that have equal accuracy."""
        self.passes += len(encoded.inputs)
        return -F.cross_entropy(model.head(features(model, encoded)), encoded.labels).item()

    def run(self, method: str, model: Classifier) -> Run:
        """A trained model, measured."""
        seconds = time.process_time() - self.began
        parameters = sum(p.numel() for name in glora.adapters(model.encoder) for p in _of(model, name).values())
        test = accuracy(model, self.test)
        return Run(self.task, method, self.seed, parameters, self.passes, test, seconds)


def longer(work: Work) -> list[Run]:
    model = work.classifier()
    glora.apply(model.encoder, model.targets, UNIFORM[0])
    work.train(model, _groups(model), work.size.longer)
    return [work.run(LONGER, model)]


def best_of_three(work: Work) -> list[Run]:
    found: list[tuple[float, Classifier]] = []
    for config in UNIFORM:
        model = work.classifier()
        glora.apply(model.encoder, model.targets, config)
        work.train(model, _groups(model), work.size.each)
        found.append((work.likelihood(model, work.validation), model))
    return [work.run(BEST, max(found, key=lambda each: each[0])[1])]


def singular_values(work: Work) -> list[Run]:
    gradients, weights = full_gradients(work)
    ranks = ranks_of(gradients, weights, budget(weights))
    model = work.classifier()
    for path, preset in (("A", _C.hira), ("B", _C.lora)):
        configs = {re.escape(layer): preset(rank=rank) for (layer, of), rank in ranks.items() if of == path}
        if configs:
            glora.apply(model.encoder, configs, name=path, freeze=False)
    names = list(glora.adapters(model.encoder))
    glora.activate(model.encoder, dict.fromkeys(names, 1.0))
    work.train(model, [Group(list(_of(model, name).values())) for name in names], work.size.singular)
    return [work.run(SINGULAR, model)]


def full_gradients(work: Work) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of each layer, by its path: the gradient of its weight over all training examples, and the weight."""
    model, encoded = work.classifier().eval(), work.train_set
    found = features(model, encoded)
    optimizer = torch.optim.Adam(model.head.parameters(), lr=HEAD_LR)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model.head(found), encoded.labels).backward()
        optimizer.step()
    weights = weights_of(model)
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_()
    for first in range(0, len(encoded.inputs), BATCH):
        rows = slice(first, first + BATCH)
        F.cross_entropy(model(encoded.inputs[rows]), encoded.labels[rows], reduction="sum").backward()
    work.passes += (1 + 3) * len(encoded.inputs)
    return {path: weight.grad for path, weight in weights.items() if weight.grad is not None}, weights


def ranks_of(gradients: Mapping[str, Tensor], weights: Mapping[str, Tensor], budget: int) -> Counter[tuple[str, str]]:
    """The ranks of A and B in each layer: the largest singular values of all, as far as the parameters reach.

    Example:
        >>> G = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
        >>> dict(ranks_of({"a": G, "b": 0.1 * G}, {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, 12))
        {('a', 'A'): 2, ('a', 'B'): 1}
    """
    directions: list[tuple[float, tuple[str, str], int]] = []
    for layer, gradient in gradients.items():
        weight = weights[layer].detach()
        for path, matrix in (("A", gradient * weight / _rms(weight)), ("B", gradient)):
            sizes = torch.linalg.svdvals(matrix)
            directions += [(size, (layer, path), sum(weight.shape)) for size in sizes.tolist()]
    ranks: Counter[tuple[str, str]] = Counter()
    for _, place, cost in sorted(directions, key=lambda each: -each[0]):
        if cost <= budget:
            ranks[place] += 1
            budget -= cost
    return ranks


def search(work: Work) -> list[Run]:
    model = work.classifier()
    weights = weights_of(model)
    speed = {path: 1 / _rms(weight).item() for path, weight in weights.items()}
    glora.search.supernet(model.encoder, model.targets, SPACE, seed=work.seed)
    work.train(model, _groups(model, speed), work.size.supernet)
    targets = glora.search.evolve(
        model.encoder,
        lambda _: work.likelihood(model, work.seen),
        budget=budget(weights),
        trials=work.size.trials,
        seed=work.seed,
    ).targets
    spent, found = work.passes, time.process_time()
    glora.search.extract(model.encoder, targets)
    work.train(model, _groups(model, speed), work.size.last)
    runs = [work.run(TRAINED_ON, model)]
    work.passes, work.began = spent, work.began + time.process_time() - found  # without the last epochs of that one
    anew = work.classifier()
    balanced = {re.escape(path): replace(config, balance="rms") for path, config in targets.items()}
    glora.apply(anew.encoder, balanced)
    work.train(anew, _groups(anew), work.size.last)
    return [*runs, work.run(ANEW, anew)]


METHODS: dict[str, Callable[[Work], list[Run]]] = {
    TRAINED_ON: search,
    LONGER: longer,
    SINGULAR: singular_values,
    BEST: best_of_three,
}


def weights_of(model: Classifier) -> dict[str, nn.Parameter]:
    """Path to weight of each layer that is adapted."""
    layers = glora.plan(model.encoder, model.targets).layers
    return {layer.path: cast("Any", layer.module).weight for layer in layers}


def budget(weights: Mapping[str, Tensor]) -> int:
    """The parameters of LoRA r8."""
    return sum(UNIFORM[0].rank * sum(weight.shape) for weight in weights.values())


def _rms(weight: Tensor) -> Tensor:
    return weight.detach().square().mean().sqrt()


def _of(model: Classifier, name: str) -> dict[str, nn.Parameter]:
    return dict(glora.named_parameters(model.encoder, name))


def _groups(model: Classifier, speed: Mapping[str, float] | None = None) -> list[Group]:
    """The only adapter's parameters; with a `speed` of each layer, A's left is trained at that multiple."""
    return [
        Group([parameter], (speed or {}).get(key.removesuffix(".A.left"), 1.0))
        for key, parameter in glora.named_parameters(model.encoder)
    ]


# --- what is shown -------------------------------------------------------------------------------------------------


def differences(runs: Sequence[Run], method: str, other: str) -> list[list[float]]:
    """Test accuracy less the other method's, of each seed that both have; a list for each task."""
    of = {(run.task, run.method, run.seed): run.test for run in runs}
    tasks, seeds = list(dict.fromkeys(run.task for run in runs)), sorted({run.seed for run in runs})
    pairs = [[(of.get((task, method, seed)), of.get((task, other, seed))) for seed in seeds] for task in tasks]
    return [[mine - theirs for mine, theirs in each if mine is not None and theirs is not None] for each in pairs]


def table(runs: Sequence[Run]) -> None:
    rows: list[dict[str, str]] = []
    for method in (LONGER, BEST, SINGULAR, TRAINED_ON, ANEW):
        mine = [run for run in runs if run.method == method]
        if not mine:
            continue
        cells = {"method": method}
        for task in dict.fromkeys(run.task for run in runs):
            found = [run.test for run in mine if run.task == task]
            cells[task] = f"{fmean(found):.1f} ({len(found)})" if found else "-"
        for other in (LONGER, BEST):
            apart = None if method == other else interval(differences(runs, method, other))
            cells[f"less {other}"] = "-" if apart is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*apart)
        cells["parameters"] = f"{min(run.parameters for run in mine):,}"
        cells["passes"] = f"{fmean(run.passes for run in mine):,.0f}"
        cells["CPU s"] = f"{fmean(run.cpu_s for run in mine):.0f}"
        rows.append(cells)
    markdown("Test accuracy in percent (seeds), and paired differences with 95% intervals over seeds", rows)


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draw the differences to the best of three with their intervals."""
    found = {each: interval(differences(runs, each, BEST)) for each in (LONGER, SINGULAR, TRAINED_ON, ANEW)}
    shown = {method: apart for method, apart in found.items() if apart is not None}
    if not shown:
        return
    needs("matplotlib").use("Agg")
    figure, axis = needs("matplotlib.pyplot").subplots(figsize=(8, 2.6), layout="constrained")
    for place, (middle, low, high) in enumerate(shown.values()):
        axis.errorbar([middle], [place], xerr=[[middle - low], [high - middle]], fmt="o", capsize=3, color="#0072B2")
    axis.axvline(0, color="grey", linestyle="--")
    axis.set_yticks(range(len(shown)), list(shown))
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    figure.suptitle("Right of the line: better than the best of three, at equal compute (points, 95%)")
    report.save_figure(figure, path)


def main() -> None:
    """The command: runs, a seed of everything before the next; then the table and the plot."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["trec50", "tweets"], metavar="TASK")
    parser.add_argument("--seeds", type=int, default=5, help="of data and start (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="run nothing: the table and the plot of what is there")
    parser.add_argument("--quick", action="store_true", help="little data, two seeds of one task, into a new folder")
    parser.add_argument("--out", type=Path, help="folder of search-ranks.csv (default: results; quick: a new one)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    out = options.out or (Path(tempfile.mkdtemp(prefix="glora-")) if options.quick else RESULTS)
    tasks, seeds, size = (["trec6"], 2, QUICK) if options.quick else (options.tasks, options.seeds, Size())
    store = Store(out / "search-ranks.csv", Run, report.machine("cpu"))
    for seed in [] if options.report else range(seeds):
        for task in tasks:
            for method, make in METHODS.items():
                if (task, method, seed) in {(run.task, run.method, run.seed) for run in store.read()}:
                    continue
                for run in make(Work(task, seed, size)):
                    store.add(run)
                    print(f"{task} {run.method} {seed}: {run.test:.1f} {run.passes} {run.cpu_s:.0f}s", flush=True)
    table(store.read())
    plot(store.read(), out / "search-ranks.png")


if __name__ == "__main__":
    main()
