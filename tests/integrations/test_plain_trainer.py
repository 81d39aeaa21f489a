"""A Trainer that nobody has given the mixin saves adapters, resumes, or refuses before training; others are as ever."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

import glora
from glora.integrations.trainer import AdapterCheckpoints
from tests.helpers.calls import RANDOM
from tests.helpers.models import Residual
from tests.helpers.trainers import SHORT

os.environ["HF_HUB_OFFLINE"] = "1"
transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")

DATA = [
    {"input_ids": torch.randint(0, 50, (8,), generator=torch.Generator().manual_seed(i)), "labels": torch.tensor(i % 2)}
    for i in range(24)
]


@pytest.fixture(autouse=True)
def clean_dynamo() -> Generator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def base() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **sizes))


def adapted() -> Any:
    return glora.apply(base(), ["query", "value"], RANDOM, trainable="auto")


def trainer(model: Any, folder: Path, kind: Any = transformers.Trainer, **given: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder),
        **{**SHORT, "logging_steps": 1, **given},
    )
    return kind(model, arguments, train_dataset=DATA, eval_dataset=DATA)


def same(model: Any, other: Any) -> bool:
    here, there = glora.state_dict(model), glora.state_dict(other)
    return list(here) == list(there) and all(torch.equal(here[key], there[key]) for key in here)


def test_checkpoints_hold_the_adapter_and_resume_as_with_the_mixin(tmp_path: Path) -> None:
    class Asked(AdapterCheckpoints, transformers.Trainer):
        pass

    asked = trainer(adapted(), tmp_path / "asked", Asked)
    asked.train()
    plain = trainer(adapted(), tmp_path / "plain")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plain.train()
    assert sum("these hold the active one alone" in str(warning.message) for warning in said) == 1
    assert same(plain.model, asked.model)
    checkpoint = tmp_path / "plain" / "checkpoint-3"
    assert [file.name for file in checkpoint.iterdir() if file.suffix == ".safetensors"] == [
        "adapter_model.safetensors"
    ]
    again = trainer(adapted(), tmp_path / "plain")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert same(again.model, plain.model)
    plain.save_model(str(tmp_path / "final"))
    assert same(glora.load(base(), tmp_path / "final"), plain.model)


def test_the_best_model_comes_back(tmp_path: Path) -> None:
    evaluated = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    each = trainer(adapted(), tmp_path, metric_for_best_model="loss", greater_is_better=True, **evaluated)
    each.train()
    best = glora.load(base(), each.state.best_model_checkpoint)
    assert same(each.model, best)
    steps = [glora.load(base(), tmp_path / f"checkpoint-{step}") for step in (3, 6)]
    assert not same(*steps)


def test_a_part_of_the_model_may_be_what_is_adapted(tmp_path: Path) -> None:
    model = base()
    glora.apply(model.bert, ["query", "value"], RANDOM)
    model.classifier.requires_grad_(False)
    trainer(model, tmp_path).train()
    assert same(glora.load(base(), tmp_path / "checkpoint-6"), model)


def test_what_a_checkpoint_would_lose_is_refused_before_training(tmp_path: Path) -> None:
    model = adapted()
    model.bert.embeddings.LayerNorm.weight.requires_grad_(True)
    each = trainer(model, tmp_path)
    with pytest.raises(ValueError, match="must hold everything that trains; bert.embeddings.LayerNorm.weight are no"):
        each.train()
    assert each.state.global_step == 0
    trainer(model, tmp_path, save_strategy="no").train()


def test_other_models_and_other_ways_to_save_are_left_alone(tmp_path: Path) -> None:
    class Mine(transformers.Trainer):
        def _save(self, output_dir: Any = None, **_: Any) -> None:
            glora.save(self.model, Path(output_dir, "mine"))

    mine = trainer(adapted(), tmp_path / "mine", Mine, save_total_limit=1)
    mine.train()
    assert type(mine) is Mine
    assert same(glora.load(base(), tmp_path / "mine" / "checkpoint-6" / "mine"), mine.model)
    for model in (base(), glora.remove(adapted()), glora.apply(Residual(), config=RANDOM)):
        assert type(trainer(model, tmp_path)) is transformers.Trainer


def test_a_trainer_made_before_the_adapters_is_told_what_to_do(tmp_path: Path) -> None:
    model = base()
    each = trainer(model, tmp_path)
    glora.apply(model, ["query", "value"], RANDOM)
    with pytest.raises(RuntimeError, match="Nothing was written.*make it after them, or give it the mixin"):
        each.save_model(str(tmp_path / "final"))
    assert not list((tmp_path / "final").glob("*.safetensors"))


LATE = """
import sys, glora, transformers
sizes = dict(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
model = glora.apply(transformers.BertModel(transformers.BertConfig(**sizes)), ["query"])
assert "transformers.trainer" not in sys.modules
from transformers import Trainer, TrainingArguments
Trainer(model, TrainingArguments(sys.argv[1], use_cpu=True, report_to=[])).save_model()
glora.load(glora.remove(model), sys.argv[1])
"""


@pytest.mark.integration
def test_a_trainer_that_is_imported_after_the_adapters_were_attached(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", LATE, str(tmp_path)], check=True, timeout=120)


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig"])
def test_a_model_that_transformers_has_quantised_trains(kind: str, tmp_path: Path) -> None:
    ao: Any = pytest.importorskip("torchao.quantization")
    base().save_pretrained(tmp_path / "base")

    def quantised() -> Any:
        config = transformers.TorchAoConfig(getattr(ao, kind)())
        load = transformers.BertForSequenceClassification.from_pretrained
        return load(tmp_path / "base", quantization_config=config)

    with pytest.raises(ValueError, match="purely quantized"):
        trainer(quantised(), tmp_path)
    model = glora.apply(quantised(), ["query", "value"], RANDOM)
    before = {key: tensor.clone() for key, tensor in glora.state_dict(model).items()}
    trainer(model, tmp_path).train()
    assert not vars(model).keys() & {"_hf_peft_config_loaded"}
    assert any(not torch.equal(tensor, before[key]) for key, tensor in glora.state_dict(model).items())
    again = trainer(glora.apply(quantised(), ["query", "value"], RANDOM), tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(again.model, model)
