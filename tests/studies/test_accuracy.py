"""studies.accuracy: parts of the data, runs that a file remembers, tables that say what they are over."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from studies.accuracy import data, tables
from studies.accuracy.data import SEEDS, Task, splits
from studies.accuracy.runs import LEARNING_RATES, PROBE, Plan, Run, Runs, chosen_rate


def outcome(task: str, method: str, seed: int, lr: float, test: float) -> Run:
    return Run(task, method, "test", seed, lr, 1, 8, 10, 1.0, 0.5, 50.0, test)


def attempt(task: str, method: str, seed: int, lr: float, validation: float) -> Run:
    return Run(task, method, "choose", seed, lr, 1, 8, 10, 1.0, 0.5, validation)


def test_no_example_is_in_two_parts_and_texts_that_differ_in_case_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(f"{word} {i}", str(i % 2)) for i in range(60) for word in ("text", "TEXT")]
    monkeypatch.setitem(data.TASKS, "made", Task(lambda: pairs, "text"))
    found = [splits("made", seed, (10, 4, 6)) for seed in range(SEEDS)]
    texts = [text for each in found for part in (each.train, each.validation, each.test) for text in part.inputs]
    assert len(texts) == len(set(texts)) == 60
    with pytest.raises(ValueError, match="60 examples"):
        splits("made", 0, (10, 5, 6))


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


def test_a_file_of_runs_reads_as_written_and_loses_the_line_that_was_cut_off(tmp_path: Path) -> None:
    runs = [attempt("trec6", "LoRA r8", 0, 1e-3, 75.5), outcome("trec6", "LoRA r8", 0, 1e-3, 70.25)]
    store = Runs(tmp_path / "accuracy.csv", "about")
    for run in runs:
        store.add(run)
    with store.path.open("a") as file:
        file.write("trec6,LoRA r8,test,1,0.0")
    assert Runs(store.path, "about").read() == runs


def test_the_learning_rate_is_chosen_once_every_rate_has_its_seeds_and_the_lower_of_equals() -> None:
    plan = Plan(seeds=2, choosing=2)
    runs = [attempt("trec6", "m", seed, lr, 50.0) for seed in (0, 1) for lr in LEARNING_RATES]
    assert chosen_rate(runs, "trec6", "m", plan) == LEARNING_RATES[0]
    assert chosen_rate(runs[1:], "trec6", "m", plan) is None
    better = [*runs[:-1], attempt("trec6", "m", 1, LEARNING_RATES[-1], 51.0)]
    assert chosen_rate(better, "trec6", "m", plan) == LEARNING_RATES[-1]


def test_a_mean_is_over_the_tasks_of_one_model_and_of_the_methods_run_on_each() -> None:
    runs = [outcome(task, "LoRA r8", seed, 1e-3, 70.0) for task in ("trec6", "tweets", "fashion") for seed in (0, 1)]
    runs += [outcome("trec6", "IA3", seed, 1e-3, 60.0 + seed) for seed in (0, 1)]
    runs += [outcome("tweets", "IA3", 0, 1e-3, 60.0), outcome("fashion", "SSF", 0, 1e-3, 60.0)]
    tests = tables.Tests.of(runs)
    assert tests.alike == [["trec6", "tweets"]]
    assert [row["method"] for row in tables.mean_rows(tests, ["trec6", "tweets"])] == ["LoRA r8"]
    assert tests.missing(["trec6", "tweets"]) == {"IA3": ["tweets"]}


def test_a_learning_rates_mean_is_over_the_seeds_that_tried_each_rate() -> None:
    runs = [attempt("trec6", "m", 0, lr, 50.0) for lr in LEARNING_RATES]
    runs += [attempt("trec6", "m", 1, lr, 90.0) for lr in LEARNING_RATES[:2]]
    tests = tables.Tests.of([*runs, *(outcome("trec6", "m", seed, 1e-3, 1.0) for seed in (0, 1))])
    assert tests.validation("trec6", "m") == dict.fromkeys(LEARNING_RATES, 50.0)
    assert tests.validation("trec6", "another") == {}
    assert tables.task_rows(tests, "trec6")[0]["learning rate (seeds)"] == "0.001 (1)"


def test_the_probe_has_no_learning_rate_and_one_that_was_given_is_said_to_be() -> None:
    runs = [outcome("trec6", method, seed, 1e-3, 1.0) for method in (PROBE, "IA3") for seed in (0, 1)]
    rows = tables.task_rows(tables.Tests.of(runs), "trec6")
    assert {row["method"]: row["learning rate (seeds)"] for row in rows} == {PROBE: "", "IA3": "0.001 (given)"}
