"""transformers' Trainer: checkpoints of the adapter alone, and the same numbers after resuming from one."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glora
from glora.integrations.trainer import AdapterCheckpoints
from tests.helpers.calls import RANDOM
from tests.helpers.models import Residual
from tests.helpers.trainers import SHORT

os.environ["HF_HUB_OFFLINE"] = "1"
transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = Residual(), nn.Dropout(0.1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(self.drop(x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class AdapterTrainer(AdapterCheckpoints, transformers.Trainer):
    pass


@pytest.fixture(autouse=True)
def clean_dynamo() -> Generator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


DATA = [{"x": torch.randn(6, generator=torch.Generator().manual_seed(i)), "labels": i % 3} for i in range(24)]


def trainer(folder: Path, trainer_class: Any = AdapterTrainer, **given: Any) -> Any:
    torch.manual_seed(0)
    model = glora.apply(Classifier(), config=RANDOM, exclude=["head"], trainable=["head"])
    arguments = transformers.TrainingArguments(
        str(folder),
        **{**SHORT, "logging_steps": 1, **given},
    )
    return trainer_class(model, arguments, train_dataset=DATA, eval_dataset=DATA)


def losses(of: Any) -> list[float]:
    return [row["loss"] for row in of.state.log_history if "loss" in row]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.integration)])
def test_resuming_from_an_adapter_alone_gives_the_same_numbers(compiled: bool, tmp_path: Path) -> None:
    given: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
    whole = trainer(tmp_path / "whole", **given)
    whole.train()
    plain = trainer(tmp_path / "plain", transformers.Trainer, **given)
    plain.train()
    assert losses(whole) == losses(plain)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    weights = [file.name for file in checkpoint.iterdir() if file.suffix == ".safetensors"]
    assert weights == ["adapter_model.safetensors"]
    assert not (checkpoint / "pytorch_model.bin").exists()
    again = trainer(tmp_path / "again", **given)
    again.train(resume_from_checkpoint=str(checkpoint))
    expected, found = glora.state_dict(whole.model), glora.state_dict(again.model)
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert losses(again) == losses(whole)
    fresh = glora.load(Classifier(), checkpoint)
    assert list(glora.state_dict(fresh)) == list(expected)


def test_the_best_model_comes_back(tmp_path: Path) -> None:
    each = trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first checkpoint is then the best
    )
    each.train()
    assert each.state.best_model_checkpoint.endswith("checkpoint-3")
    best = glora.state_dict(glora.load(Classifier(), each.state.best_model_checkpoint))
    found = glora.state_dict(each.model)
    assert all(torch.equal(found[key], best[key]) for key in best)
    last = glora.state_dict(glora.load(Classifier(), tmp_path / "checkpoint-6"))
    assert any(not torch.equal(last[key], best[key]) for key in best)


def test_whole_checkpoints_are_left_to_the_trainer(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "plain", transformers.Trainer)
    whole.train()
    again = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-3"))
    assert losses(again) == losses(whole)


def test_what_a_checkpoint_of_the_adapter_would_lose_is_refused(tmp_path: Path) -> None:
    each = trainer(tmp_path)
    each.model.net.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="must hold everything that trains; net.norm.weight are no part of 'default'"):
        each.save_model()
    each.model.net.norm.weight.requires_grad_(False)
    glora.activate(each.model, {})
    with pytest.raises(ValueError, match="holds the one that acts; found none"):
        each.save_model()
    assert not list(tmp_path.rglob("*.safetensors"))
