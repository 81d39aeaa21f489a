"""Random modules that no file has: named by `apply`, and known by `load` in another process."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from tests.helpers.calls import LORA, RANDOM, warned

transformers: Any = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def checkpoints() -> Iterator[Path]:
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with tempfile.TemporaryDirectory() as folder:
        bert = transformers.BertConfig(**sizes, intermediate_size=8, num_labels=3)
        transformers.BertModel(bert).save_pretrained(f"{folder}/encoder")
        transformers.BertForSequenceClassification(bert).save_pretrained(f"{folder}/tuned")
        for tied in (True, False):
            llama = transformers.LlamaConfig(
                **sizes, intermediate_size=8, num_key_value_heads=2, tie_word_embeddings=tied
            )
            transformers.LlamaForCausalLM(llama).save_pretrained(f"{folder}/{'tied' if tied else 'untied'}")
        yield Path(folder)
    logging.disable(logging.NOTSET)


def classifier(source: Path, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=3)


def language_model(source: Path, words: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    if words:
        model.resize_token_embeddings(40 + words, mean_resizing=False)
    return model


def said(model: nn.Module, targets: list[str], **arguments: Any) -> list[str]:
    return [text for text in warned(lambda: glora.apply(model, targets, LORA, **arguments)) if "no checkpoint" in text]


def test_a_new_head_that_stays_random_is_named(checkpoints: Path) -> None:
    (message,) = said(classifier(checkpoints / "encoder"), ["query"])
    assert "trainable=['classifier'] trains it" in message
    assert said(classifier(checkpoints / "tuned"), ["query"]) == []
    for trainable in (["classifier"], "auto"):
        assert said(classifier(checkpoints / "encoder"), ["query"], trainable=trainable) == []
    assert said(classifier(checkpoints / "encoder"), ["query", "classifier"]) == []
    (message,) = said(nn.Sequential(classifier(checkpoints / "tuned"), nn.Linear(3, 2)), ["query"])
    assert "trainable=['1']" in message  # a head of the user's own


@pytest.mark.parametrize("tied", ["tied", "untied"])
def test_new_words_that_stay_random_are_named(checkpoints: Path, tied: str) -> None:
    assert said(language_model(checkpoints / tied, 0), ["q_proj"]) == []
    (message,) = said(language_model(checkpoints / tied, 3), ["q_proj"])
    places = ["lm_head", "model.embed_tokens"]
    assert all(f"'{place}'" in message for place in places)
    trainable = ["embed_tokens"] if tied == "tied" else places
    assert said(language_model(checkpoints / tied, 3), ["q_proj"], trainable=trainable) == []


def test_a_model_without_a_checkpoint_is_not_accused(checkpoints: Path) -> None:
    plain = transformers.BertForSequenceClassification(transformers.AutoConfig.from_pretrained(checkpoints / "encoder"))
    assert said(plain, ["query"]) == []
    assert said(copy.deepcopy(classifier(checkpoints / "encoder")), ["query"]) == []  # a copy has no marks


@pytest.mark.parametrize("kind", ["head", "tied", "untied"])
def test_another_process_is_told(checkpoints: Path, kind: str, tmp_path: Path) -> None:
    def build(seed: int) -> nn.Module:
        if kind == "head":
            return classifier(checkpoints / "encoder", seed)
        return language_model(checkpoints / kind, 3, seed)

    place, targets = ("classifier", ["query"]) if kind == "head" else ("model.embed_tokens", ["q_proj"])
    model = build(1)
    warned(lambda: glora.apply(model, targets, LORA))
    glora.save(model, tmp_path)
    with pytest.raises(glora.AdapterFileError, match=rf"{place}.weight.*Nothing was changed"):
        glora.load(build(2), tmp_path, strict=True)
    with pytest.warns(UserWarning, match=rf"trained beside others.*{place}.weight"):
        glora.load(build(2), tmp_path)
    glora.load(build(1), tmp_path, strict=True)


SIZES = st.integers(1, 5)


@given(st.lists(st.tuples(SIZES, SIZES), min_size=2, max_size=4), st.data())
def test_any_frozen_parameter_outside_that_is_another_is_named(
    shapes: list[tuple[int, int]], data: st.DataObject
) -> None:
    model = nn.ModuleList([nn.Linear(4, 4), *(nn.Linear(*shape) for shape in shapes), nn.LayerNorm(4)])
    base = copy.deepcopy(model)
    glora.apply(model, ["0"], RANDOM, trainable=["1"])
    with tempfile.TemporaryDirectory() as folder:
        glora.save(model, folder)
        glora.load(copy.deepcopy(base), folder, strict=True)
        glora.load(copy.deepcopy(base).bfloat16(), folder, strict=True)
        with torch.no_grad():  # what the adapter holds itself does not count
            base[1].weight.add_(1)
        glora.load(copy.deepcopy(base), folder, strict=True)
        outside = [name for name, _ in base.named_parameters() if name[0] not in "01"]
        name = data.draw(st.sampled_from(outside))
        with torch.no_grad():
            base.get_parameter(name).add_(1)
        with pytest.raises(glora.AdapterFileError, match=name):
            glora.load(base, folder, strict=True)


def test_what_an_older_file_does_not_say_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base = copy.deepcopy(model)
    monkeypatch.setattr("glora.model.state._outside", lambda *_: {})
    glora.save(glora.apply(model, ["0"], RANDOM), tmp_path)
    assert "outside" not in (tmp_path / "glora_config.json").read_text()
    with torch.no_grad():
        base[1].weight.add_(1)
    glora.load(base, tmp_path, strict=True)
