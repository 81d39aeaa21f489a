"""sentence-transformers' Trainer, which saves and loads in its own way, with an adapted model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import glora
from tests.helpers.calls import RANDOM, attach
from tests.helpers.trainers import SHORT

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
library: Any = pytest.importorskip("sentence_transformers")
datasets: Any = pytest.importorskip("datasets")
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tiny BERT and its tokenizer in `base`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]"] + [f"w{i}" for i in range(38)]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path / "base"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    BertModel(BertConfig(vocab_size=40, **sizes)).save_pretrained(tmp_path / "base")
    return tmp_path


def base(folder: Path) -> Any:
    modules: Any = pytest.importorskip("sentence_transformers.models")
    words = modules.Transformer(str(folder / "base"))
    return library.SentenceTransformer(modules=[words, modules.Pooling(8)], device="cpu")


def trainer(model: Any, folder: Path, **given: Any) -> Any:
    rows = [{"anchor": f"w{i} w{i + 1}", "positive": f"w{i + 2} w{i}"} for i in range(24)]
    args = library.SentenceTransformerTrainingArguments(
        str(folder / "run"),
        **{**SHORT, **given},
    )
    data = datasets.Dataset.from_list(rows)
    losses: Any = pytest.importorskip("sentence_transformers.losses")
    loss = losses.MultipleNegativesRankingLoss(model)
    return library.SentenceTransformerTrainer(model, args, train_dataset=data, eval_dataset=data, loss=loss)


def same(model: Any, other: Any) -> bool:
    here, there = glora.state_dict(model), glora.state_dict(other)
    return list(here) == list(there) and all(torch.equal(here[key], there[key]) for key in here)


def adapted(folder: Path) -> Any:
    model = base(folder)
    torch.manual_seed(1)
    return attach(model, RANDOM, targets=["query", "value"])


def test_checkpoints_resume_and_the_final_model_is_the_adapter(folder: Path) -> None:
    whole = trainer(adapted(folder), folder)
    whole.train()
    again = trainer(adapted(folder), folder)
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-3"))
    assert same(again.model, whole.model)
    whole.save_model(str(folder / "final"))
    read = glora.load(base(folder), folder / "final")
    assert same(read, whole.model)
    assert torch.equal(
        read.encode("w1 w2", convert_to_tensor=True), whole.model.encode("w1 w2", convert_to_tensor=True)
    )


def test_the_best_model_comes_back(folder: Path) -> None:
    evaluated = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "save_total_limit": 2}
    each = trainer(adapted(folder), folder, metric_for_best_model="loss", greater_is_better=True, **evaluated)
    each.train()
    assert same(each.model, glora.load(base(folder), each.state.best_model_checkpoint))
