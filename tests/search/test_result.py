"""Results: the best choice, and those that no other beats."""

from __future__ import annotations

import pytest

from glora import GLoRAConfig
from glora.search.result import Trial, result_of

TARGETS = {
    "a.b": GLoRAConfig.lora(rank=2, alpha=4.0),
    "c": GLoRAConfig.glora(A="constant", B="vector", product="matmul"),
}


def trial(number: int, parameters: int, score: float | None) -> Trial:
    return Trial(number, TARGETS, parameters, score, None if score is not None else "it broke")


def test_the_best_and_the_front() -> None:
    trials = [trial(*row) for row in [(0, 9, 0.5), (1, 5, 0.5), (2, 5, 0.5), (3, 2, 0.1), (4, 7, 0.3), (5, 1, None)]]
    result = result_of(trials)
    assert (result.score, result.parameters) == (0.5, 5)
    assert [t.number for t in result.front] == [3, 1]
    with pytest.raises(RuntimeError, match="of 1 none did: it broke"):
        result_of(trials[-1:])
