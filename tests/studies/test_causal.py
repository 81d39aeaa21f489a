"""studies.causal: windows, the file of runs, the choice of a learning rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")

from benchmarks import causal
from studies.causal import LEARNING_RATES, TOKENS, Row


def row(method: str, seed: int, lr: float, validation: float, test: float) -> Row:
    numbers = {"seed": seed, "lr": lr, "steps": 100, "trainable": 8, "cpu_s": 1.5, "train_loss": 3.0}
    return {"method": method} | numbers | {"validation_loss": validation, "test_loss": test}


def test_windows_are_whole_and_reach_from_end_to_end() -> None:
    ids = torch.arange(1000)
    found = causal.windows(ids, 5)
    assert found.shape == (5, TOKENS)
    assert (found[0, 0], found[-1, -1]) == (0, 999)
    assert (found.diff(dim=1) == 1).all()


def test_runs_read_as_written(tmp_path: Path) -> None:
    rows = [row("LoRA r8", 0, 1e-3, 3.25, 3.5), row("HiRA r8", 1, 2.5e-2, 3.125, 3.75)]
    assert causal.read(tmp_path / "causal.csv") == []
    for each in rows:
        causal.add(tmp_path / "causal.csv", each)
    assert causal.read(tmp_path / "causal.csv") == rows


def test_the_rate_is_chosen_by_validation_of_the_first_seed_whatever_the_test_loss() -> None:
    rows = [row("LoRA r8", 0, lr, 9 - i, 1.0) for i, lr in enumerate(LEARNING_RATES[:-1])]
    rows += [row("LoRA r8", 0, LEARNING_RATES[-1], 2.0, 4.0)]
    assert causal.chosen_rate(rows, "LoRA r8") == LEARNING_RATES[-1]
    assert causal.chosen_rate(rows[:-1], "LoRA r8") is None
    rows += [row("LoRA r8", 1, LEARNING_RATES[-1], 9.0, 6.0), row("GLoRA r4", 0, LEARNING_RATES[0], 1.0, 1.0)]
    (found,) = causal.summary(rows)  # of GLoRA not all rates have been run
    assert (found["lr"], found["seeds"], found["test loss"]) == (LEARNING_RATES[-1], 2, "5.000 +- 1.414")
