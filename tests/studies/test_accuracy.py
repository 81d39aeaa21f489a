"""studies.accuracy: parts of the data, which runs are wanted, tables that say what they are over."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from studies.accuracy import data, tables
from studies.accuracy.data import Task, splits
from studies.accuracy.methods import METHODS
from studies.accuracy.model import Classifier
from studies.accuracy.runs import BEYOND, CHOOSING, LEARNING_RATES, Run, chosen_rate, runs_at_chosen_rate, wanted

LORA, OTHER = "LoRA r8", "A r8"


def run(task: str, method: str, seed: int, lr: float, validation: float = 50.0, test: float = 60.0) -> Run:
    return Run(task, method, seed, lr, 8, 1, 10, 1.0, 0.5, validation, test)


def test_no_example_is_in_two_parts_of_a_seed_and_texts_that_differ_in_case_are_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = [(f"{word} {i}", str(i % 2)) for i in range(20) for word in ("text", "TEXT")]
    monkeypatch.setitem(data.TASKS, "made", Task(lambda: pairs, "text"))
    found = [splits("made", seed, (10, 4, 6)) for seed in range(2)]
    for each in found:
        texts = [text for part in (each.train, each.validation, each.test) for text in part.inputs]
        assert len(texts) == len(set(texts)) == 20
    assert found[0].train.inputs != found[1].train.inputs
    assert [len(part) for part in (found[0].train, found[0].validation, found[0].test)] == [10, 4, 6]
    assert len(splits("made", 0, (10, 5, 6)).test) == 5  # what is left
    with pytest.raises(ValueError, match="20 examples"):
        splits("made", 0, (10, 10, 6))


def test_digits_are_squares_of_28_pixels() -> None:
    pairs = data.TASKS["digits"].read()
    assert {len(image) for image, _ in pairs} == {28 * 28}
    assert {label for _, label in pairs} == {str(digit) for digit in range(10)}
    assert max(max(image) for image, _ in pairs[:20]) == 255


def test_fashion_mnist_is_read_from_the_folder_that_the_variable_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = bytes(range(256)) * (784 * 40 // 256 + 1)
    labels = bytes(i % 2 for i in range(40))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images[: 784 * 40]))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels))
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    pairs = data.TASKS["fashion"].read()
    assert [label for _, label in pairs] == [str(label) for label in labels]
    assert b"".join(image for image, _ in pairs) == images[: 784 * 40]


@pytest.mark.parametrize("folder", [None, "nowhere"])
def test_an_absent_folder_is_named_with_what_to_do(folder: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASHION_MNIST", raising=False)
    if folder:
        monkeypatch.setenv("FASHION_MNIST", folder)
    with pytest.raises(RuntimeError, match=r"(?s)set the variable FASHION_MNIST.*dataset-fashion-mnist"):
        data.TASKS["fashion"].read()


# All that may be tried, a factor of 2 apart.
ALL_RATES = [LEARNING_RATES[0] * 2.0**i for i in range(-BEYOND, len(LEARNING_RATES) + BEYOND)]


def validation(lr: float, best: float) -> float:
    """A curve over the learning rates with one peak."""
    return 50.0 - abs(ALL_RATES.index(lr) - ALL_RATES.index(best))


def all_runs(best: float = LEARNING_RATES[1]) -> list[Run]:
    """Every run of two methods on two tasks and four seeds, as they are asked for one after the other."""
    runs: list[Run] = []
    while (each := next(wanted(runs, ["trec6", "tweets"], [LORA, OTHER], 4), None)) is not None:
        task, method, seed, lr = each
        runs.append(run(task, method, seed, lr, validation(lr, best), 60.0 + seed * (method == OTHER)))
    return runs


@pytest.mark.parametrize("best", ALL_RATES)
def test_each_run_is_made_once_and_further_seeds_at_the_chosen_rate_alone(best: float) -> None:
    runs = all_runs(best)
    assert len({(each.task, each.method, each.seed, each.lr) for each in runs}) == len(runs)
    assert {each.lr for each in runs if each.seed >= CHOOSING} == {best}
    assert chosen_rate(runs, "trec6", LORA) == best
    later = [each.seed for each in runs if each.seed >= CHOOSING]
    assert later == sorted(later)  # a seed of all before the next


@pytest.mark.parametrize("best", ALL_RATES)
def test_a_chosen_rate_has_a_worse_one_on_both_sides_unless_it_is_the_last_that_may_be_tried(best: float) -> None:
    at = ALL_RATES.index(best)
    first = [each for each in all_runs(best) if (each.task, each.method, each.seed) == ("trec6", LORA, 0)]
    assert {each.lr for each in first} == {*LEARNING_RATES, *ALL_RATES[max(at - 1, 0) : at + 2]} | {
        lr for lr in ALL_RATES if min(best, LEARNING_RATES[0]) <= lr <= max(best, LEARNING_RATES[-1])
    }


def test_a_rate_is_chosen_by_validation_once_each_has_its_seeds_and_the_lower_of_equals() -> None:
    middle, last = LEARNING_RATES[1:]
    runs = [
        run("trec6", "m", seed, lr, 50.0 + (lr in (middle, last)))
        for seed in range(CHOOSING)
        for lr in (*LEARNING_RATES, last * 2)
    ]
    assert chosen_rate(runs, "trec6", "m") == middle
    assert chosen_rate(runs[1:], "trec6", "m") is None
    assert runs_at_chosen_rate(runs[1:], "trec6", "m") == {}
    tempting = [*runs, run("trec6", "m", CHOOSING, last, 99.0, 99.0)]
    assert chosen_rate(tempting, "trec6", "m") == middle


def test_a_row_is_of_methods_that_ran_on_every_task_with_paired_differences() -> None:
    runs = all_runs()
    rows = tables.rows(runs, ["trec6", "tweets"], [LORA, OTHER])
    assert [row["method"] for row in rows] == [LORA, OTHER]
    assert tables.differences(runs, "trec6", OTHER) == [0.0, 1.0, 2.0, 3.0]
    assert rows[0]["less LoRA (95%)"] == ""
    assert rows[1]["less LoRA (95%)"].startswith("+1.5 [")
    alone = [each for each in runs if (each.task, each.method) != ("tweets", OTHER)]
    assert [row["method"] for row in tables.rows(alone, ["trec6", "tweets"], [LORA, OTHER])] == [LORA]


@pytest.mark.parametrize(
    "name", ["A r8", "A + B r4", "all paths r3", "A vector, B r8", "A r8, larger right", "LoRA+ r8"]
)
def test_a_method_has_about_as_many_numbers_as_the_lora_that_it_is_compared_with(name: str) -> None:
    def trained(method: str) -> int:
        model = Classifier(torch.nn.Sequential(torch.nn.Linear(384, 384)), 384, ["0"], lambda *_: torch.zeros(1), 2)
        return sum(p.numel() for group in METHODS[method](model) for p in group.parameters)

    assert trained(LORA) == pytest.approx(trained(name), rel=0.1)
