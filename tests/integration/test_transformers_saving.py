"""What transformers' `save_pretrained` writes of a model with adapters loads again, or is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

import glora
from glora import GLoRAConfig
from tests.helpers import internals
from tests.helpers.calls import RANDOM, attach, quiet, remove_with_torch, warned
from tests.helpers.state import same, same_outputs

TOKENS = torch.arange(6)[None]
CREATED = GLoRAConfig.glora(A="none", B="none", D="none", init="random", create_bias=True)


def llama(**options: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **options)).eval()


def bert() -> BertForSequenceClassification:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 16, "num_hidden_layers": 1}
    return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2)).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


MODELS = pytest.mark.parametrize("make", [llama, lambda: llama(tie_word_embeddings=True), bert])


@MODELS
def test_saving_adapted_keys_is_refused_and_both_ways_of_the_message_work(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    model = make()
    base = copy.deepcopy(model)
    attach(model)
    wanted = logits(model)
    for given in ({}, {"state_dict": model.state_dict()}, {"state_dict": None}):
        with pytest.raises(RuntimeError, match=r"glora\.save\(model.*glora\.merged\(model\).*glora\.merge\(model\)"):
            model.save_pretrained(tmp_path / "refused", **given)
    assert not (tmp_path / "refused").exists()
    glora.save(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(glora.load(base, tmp_path / "adapter", strict=True)), wanted)
    with glora.merged(model):
        model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path / "merged")), wanted)
    with pytest.raises(RuntimeError, match="plain keys"):
        model.save_pretrained(tmp_path / "refused")
    glora.merge(model).save_pretrained(tmp_path / "merge")
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path / "merge")), wanted)


def test_without_the_refusal_the_adapted_weights_would_be_lost(tmp_path: Path) -> None:
    model = attach(llama())
    type(model).save_pretrained(model, tmp_path)
    assert not torch.allclose(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(model), atol=1e-3)


@MODELS
def test_the_base_alone_is_saved_by_its_state_dict(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    wanted = logits(model)
    attach(model)
    model.save_pretrained(tmp_path, state_dict=glora.base_state_dict(model))
    loaded = type(model).from_pretrained(tmp_path)
    assert same(loaded.state_dict(), glora.base_state_dict(model))
    assert same_outputs(logits(loaded), wanted)


def test_parametrizations_of_the_model_itself_are_no_adapters(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_conv_pos_embedding_groups": 2}
    model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**sizes, **convolutions, num_conv_pos_embeddings=4))
    before = copy.deepcopy(model.state_dict())
    attach(model, targets=["q_proj"])
    model.save_pretrained(tmp_path, state_dict=glora.base_state_dict(model))
    assert any("parametrizations" in key for key in before)
    assert same(type(model).from_pretrained(tmp_path).state_dict(), before)


@pytest.mark.parametrize("finish", [glora.remove, glora.merge, lambda model: glora.delete(model, "default")])
def test_afterwards_the_model_is_plain(finish: Callable[[Any], Any], tmp_path: Path) -> None:
    model = llama()
    before = set(vars(model))
    attach(model)
    finish(model)
    assert set(vars(model)) == before
    model.save_pretrained(tmp_path)
    again = pickle.loads(pickle.dumps(model))
    assert same(again.state_dict(), LlamaForCausalLM.from_pretrained(tmp_path).state_dict())


def test_a_part_that_can_be_saved_is_watched_too(tmp_path: Path) -> None:
    model = attach(bert(), targets=["query"])
    with pytest.raises(RuntimeError, match="plain keys"):
        model.bert.save_pretrained(tmp_path)
    model.bert.embeddings.requires_grad_(False)
    other = attach(bert(), targets=["classifier"])
    other.bert.save_pretrained(tmp_path)  # it has no adapters


def test_a_copys_saving_is_its_own(tmp_path: Path) -> None:
    model = attach(llama())
    replica = copy.deepcopy(model)
    glora.merge(replica).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="plain keys"):
        model.save_pretrained(tmp_path / "refused")
    with glora.merged(model):
        inside = copy.deepcopy(model)
    inside.save_pretrained(tmp_path / "inside")
    glora.remove(model)
    replica = copy.deepcopy(attach(llama()))
    with pytest.raises(RuntimeError, match="plain keys"):
        replica.save_pretrained(tmp_path / "refused")


def test_after_torchs_own_removal_of_all_it_saves(tmp_path: Path) -> None:
    model = attach(llama(), targets=["q_proj"], config=GLoRAConfig.lora(init="random"))
    wanted = logits(model)
    for layer in list(model.model.layers.children()):
        remove_with_torch(layer.self_attn.q_proj)
    model.save_pretrained(tmp_path)
    assert same_outputs(logits(LlamaForCausalLM.from_pretrained(tmp_path)), wanted)


def test_an_apply_that_fails_leaves_no_watch() -> None:
    model = llama()
    before = set(vars(model))
    with internals.interrupted_before("glora.model.attach.guard_save_pretrained"), pytest.raises(KeyboardInterrupt):
        attach(model)
    assert set(vars(model)) == before


def test_a_trainers_checkpoint_holds_the_adapter_and_its_training_goes_without(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs it")
    model = attach(llama(), targets=["q_proj"])
    data = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 2
    options: dict[str, Any] = {"max_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    with quiet():
        arguments = TrainingArguments(str(tmp_path), save_strategy="no", **options)
        Trainer(model, arguments, train_dataset=data).train()
        arguments = TrainingArguments(str(tmp_path), save_strategy="steps", save_steps=1, **options)
        Trainer(model, arguments, train_dataset=data).train()
    trained = glora.state_dict(model)
    assert same(glora.state_dict(glora.load(glora.remove(model), tmp_path / "checkpoint-1")), trained)


# Created biases.


@pytest.mark.parametrize(
    ("targets", "flags"),
    [
        (["q_proj", "v_proj"], ["attention_bias"]),
        (["up_proj"], ["mlp_bias"]),
        (["q_proj", "down_proj"], ["attention_bias", "mlp_bias"]),
    ],
)
@pytest.mark.parametrize("how", ["merged", "merge"])
def test_created_biases_come_back_with_the_configs_flags_and_a_warning_says_so(
    targets: list[str], flags: list[str], how: str, tmp_path: Path
) -> None:
    model = attach(llama(), CREATED, targets=targets)
    wanted = logits(model)

    def save(directory: Path) -> None:
        if how == "merged":
            with glora.merged(model):
                model.save_pretrained(directory)
        else:
            glora.merge(model).save_pretrained(directory)

    (message,) = warned(lambda: save(tmp_path / "lost"))
    assert "create_bias=True has given biases to" in message
    assert "Set the config's flag for them (attention_bias" in message
    lost = LlamaForCausalLM.from_pretrained(tmp_path / "lost")
    assert not torch.allclose(logits(lost), wanted, atol=1e-6, rtol=0)
    for flag in flags:
        setattr(model.config, flag, True)
    # What a flag means is not guessed; once merged for good, the bias is the model's own.
    assert warned(lambda: save(tmp_path / "kept")) == ([message] if how == "merged" else [])
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path / "kept")), wanted)


def test_a_config_without_a_flag_is_said_too() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, vocab_size=16, decoder_start_token_id=0)
    model = attach(T5ForConditionalGeneration(config), CREATED, targets=["q"])
    with pytest.warns(UserWarning, match="else keep the adapter with glora.save"):
        glora.merge(model)


def test_created_biases_that_do_not_act_and_models_without_a_config_need_no_word() -> None:
    model = attach(llama(), CREATED, targets=["q_proj"])
    attach(model, RANDOM, targets=["down_proj"], name="other")
    assert all("merge bakes in" in message for message in warned(lambda: glora.merge(model)))
    assert warned(lambda: glora.merge(attach(nn.Sequential(nn.Linear(4, 4, bias=False)), CREATED))) == []
