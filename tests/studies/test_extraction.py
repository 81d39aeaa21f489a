"""studies.extraction: equal parameters, the nearest form, runs that are made once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import isnan, prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from studies import extraction
from studies.accuracy import data
from studies.accuracy.data import Task
from studies.accuracy.model import Classifier, Encoded, Pretrained
from studies.extraction import (
    A_AND_B,
    A_VECTOR,
    B_AND_E,
    BASE,
    FORMS,
    LAYERS,
    TUNED,
    A,
    B,
    Run,
    Tuned,
    at_rank,
    configs,
)
from studies.store import Store

SHAPES = {"q": (12, 8), "k": (8, 12), "v": (12, 12)}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.v(self.k(self.q(x).tanh()).tanh()))


def read(encoder: Encoder, inputs: Sequence[Tensor]) -> Tensor:
    return encoder(torch.stack(list(inputs)))


def letters(texts: Sequence[Any]) -> list[Tensor]:
    return [torch.tensor([float(text.count(letter)) for letter in "abcdefgh"]) for text in texts]


def pretrained() -> Pretrained:
    torch.manual_seed(0)
    return Pretrained(Encoder(), 8, ["q", "k", "v"], read, letters)


def tuned_by(change: Any) -> Tuned:
    """A model whose three weights were changed so."""
    model: Classifier = pretrained().classifier(2, 0)
    state = {key: tensor.clone() for key, tensor in model.encoder.state_dict().items()}
    for name in "qkv":
        state[f"{name}.weight"] += change(state[f"{name}.weight"])
    shapes = {name: tuple(state[f"{name}.weight"].shape) for name in "qkv"}
    return Tuned(model.requires_grad_(False).eval(), state, Encoded(letters(["a", "b"]), torch.tensor([0, 1])), shapes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_all_forms_of_a_rank_have_as_many_parameters_as_b_alone(form: str, rank: int) -> None:
    found = configs(form, rank, SHAPES)
    if (form, rank) == (A_AND_B, 1):
        assert found == {}
        return
    count = sum(
        prod(shape) for config, sizes in zip(found.values(), SHAPES.values(), strict=True)
        for key, shape in config.shapes(*sizes).items() if key != "A.balance"
    )  # fmt: skip
    wanted = rank * sum(map(sum, SHAPES.values()))
    largest = max(outputs + inputs for outputs, inputs in SHAPES.values())
    assert abs(count - wanted) <= (largest / 2 if form in (B_AND_E, A_VECTOR) else 0)


def low_rank(weight: Tensor) -> Tensor:
    return 0.1 * torch.outer(torch.randn(len(weight)), torch.randn(weight.shape[1]))


@pytest.mark.parametrize(("form", "other"), [(B, A), (A, B)])
def test_what_is_of_a_form_is_found_in_it_alone(form: str, other: str) -> None:
    tuned = tuned_by(low_rank if form == B else lambda weight: weight * low_rank(weight))
    base = {key: tensor.clone() for key, tensor in tuned.model.state_dict().items()}
    runs = {run.form: run for run in at_rank("made", tuned, 1)}
    assert runs[form].error < 1e-4
    assert runs[other].error > 0.1
    assert (runs[form].best, runs[other].best) == (100.0, 0.0)
    assert isnan(runs[A_VECTOR].best)
    assert runs[form].parameters == sum(map(sum, tuned.shapes.values()))
    found = tuned.model.state_dict()
    assert found.keys() == base.keys()
    assert all(torch.equal(found[key], base[key]) for key in base)


def test_biases_count_and_are_held_by_e() -> None:
    tuned = tuned_by(torch.zeros_like)
    for name in "qkv":
        tuned.state[f"{name}.bias"].add_(1.0)
    runs = {run.form: run for run in at_rank("made", tuned, 1)}
    assert runs[B].error == pytest.approx(1.0)
    assert runs[B_AND_E].error < 1e-6


def test_a_study_is_made_once_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    letter = random.Random(0)
    texts = ["".join(letter.choices("abcdefgh", k=12)) for _ in range(200)]
    pairs = [(text, str(int(text.count("a") > 1))) for text in texts]
    monkeypatch.setitem(data.TASKS, "made", Task(lambda: pairs, "text"))
    monkeypatch.setitem(extraction.MODELS, "text", pretrained)
    command = ["extraction", "--quick", "--tasks", "made", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    extraction.main()
    first = (tmp_path / "extraction.csv").read_text()
    runs = {(run.form, run.rank): run for run in Store(tmp_path / "extraction.csv", Run, "").read()}
    assert {form for form, rank in runs if not rank} == {BASE, LAYERS, TUNED}
    assert {form for form, rank in runs if rank == 2} == set(FORMS)
    assert runs[B, 2].error < runs[B, 1].error < 1
    assert (tmp_path / "extraction.png").stat().st_size
    monkeypatch.setattr(extraction, "tuned", None)  # not called again
    for more in ([], ["--report"]):
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", [*command, *more])
        extraction.main()
        assert (tmp_path / "extraction.csv").read_text() == first
        assert "made: relative error" in capsys.readouterr().out
