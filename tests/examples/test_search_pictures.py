"""Pictures of a search."""

from __future__ import annotations

from pathlib import Path

import pytest

from glora import GLoRAConfig
from glora.search.result import Trial, result_of

pytest.importorskip("matplotlib")
from examples.search_pictures import plot_forms, plot_front

TARGETS = {
    "a.b": GLoRAConfig.lora(rank=2, alpha=4.0),
    "c": GLoRAConfig.glora(A="constant", B="vector", product="matmul"),
}


def test_pictures_are_drawn(tmp_path: Path) -> None:
    plot_forms(TARGETS, tmp_path / "forms.png")
    trials = [Trial(0, TARGETS, 9, 0.5), Trial(1, TARGETS, 2, 0.1), Trial(2, TARGETS, 3, None, "it broke")]
    plot_front(result_of(trials), tmp_path / "front.png")
    for name in ("forms.png", "front.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
