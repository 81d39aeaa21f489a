"""The study of searches: ranks by singular values keep to the budget, and methods are compared seed by seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("optuna")
pytest.importorskip("scipy")

from studies.search import Run, Size, differences, ranks_of


@given(seed=st.integers(0, 2**16), budget=st.integers(0, 80))
def test_ranks_by_singular_values_fill_the_budget_with_the_largest(seed: int, budget: int) -> None:
    torch.manual_seed(seed)
    shapes = {"a": (3, 4), "b": (5, 2)}
    gradients = {layer: torch.randn(shape) for layer, shape in shapes.items()}
    weights = {layer: torch.randn(shape) for layer, shape in shapes.items()}
    ranks = ranks_of(gradients, weights, budget)
    spent = sum(rank * sum(shapes[layer]) for (layer, _), rank in ranks.items())
    assert spent <= budget
    assert spent > budget - 7 or all(ranks[layer, path] == min(shapes[layer]) for layer in shapes for path in "AB")


def test_equal_compute() -> None:
    size = Size()
    passes = 3 * size.longer * size.train
    assert 3 * (size.supernet + size.last) * size.train + size.trials * size.seen == passes
    assert 3 * 3 * size.each * size.train + 3 * size.validation == passes
    assert 0 <= passes - (4 + 3 * size.singular) * size.train < 3 * size.train


def test_differences_are_paired_by_seed_for_each_task() -> None:
    made = [("t", "m", 0, 5.0), ("t", "n", 0, 3.0), ("t", "m", 1, 9.0), ("u", "m", 1, 1.0), ("u", "n", 1, 2.0)]
    runs = [Run(task, method, seed, 1, 1, test, 1.0) for task, method, seed, test in made]
    assert differences(runs, "m", "n") == [[2.0], [-1.0]]
