"""Results, and choices as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from glora import GLoRAConfig
from glora.search import read_targets, write_targets
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


def test_a_choice_survives_a_file(tmp_path: Path) -> None:
    write_targets(TARGETS, tmp_path / "choice.json")
    assert read_targets(tmp_path / "choice.json") == TARGETS


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": {"B": "low"}}', '{"a": {"F": "lora"}}'])
def test_what_is_no_choice_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "choice.json").write_text(text)
    with pytest.raises(ValueError, match=r"'.*choice\.json' must be what write_targets wrote"):
        read_targets(tmp_path / "choice.json")
