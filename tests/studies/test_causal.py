"""studies.causal: windows, the choice of a learning rate."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("tqdm")

from studies import causal
from studies.causal import LEARNING_RATES, TOKENS, Run


def run(method: str, seed: int, lr: float, validation: float, test: float) -> Run:
    return Run(method, seed, lr, 100, 8, 1.5, 3.0, validation, test)


def test_windows_are_whole_and_reach_from_end_to_end() -> None:
    ids = torch.arange(1000)
    found = causal.windows(ids, 5)
    assert found.shape == (5, TOKENS)
    assert (found[0, 0], found[-1, -1]) == (0, 999)
    assert (found.diff(dim=1) == 1).all()


def test_the_rate_is_chosen_by_validation_of_the_first_seed_whatever_the_test_loss() -> None:
    runs = [run("LoRA r8", 0, lr, 9 - i, 1.0) for i, lr in enumerate(LEARNING_RATES[:-1])]
    runs += [run("LoRA r8", 0, LEARNING_RATES[-1], 2.0, 4.0)]
    assert causal.chosen_rate(runs, "LoRA r8") == LEARNING_RATES[-1]
    assert causal.chosen_rate(runs[:-1], "LoRA r8") is None
    runs += [run("LoRA r8", 1, LEARNING_RATES[-1], 9.0, 6.0), run("A r8", 0, LEARNING_RATES[0], 1.0, 1.0)]
    (found,) = causal.summary(runs)  # of A not all rates have been run
    assert (found["lr"], found["seeds"], found["test loss"]) == (LEARNING_RATES[-1], 2, "5.000 +- 1.414")
