"""Heads of transformers' task classes: `trainable="auto"`, the word on adapted heads, and tied embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import glora
from tests.helpers.calls import LORA, RANDOM, attach, refused, warned
from tests.helpers.models import Net
from tests.helpers.state import same_outputs

# A family's small config; every task class of it that transformers' tables name is tried.
SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 1,
    "num_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "dim": 8,
    "hidden_dim": 12,
    "n_heads": 2,
    "n_layers": 1,
    "n_embd": 8,
    "n_head": 2,
    "n_layer": 1,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "embedding_size": 8,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 5,
    "max_position_embeddings": 16,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
FAMILIES = [
    *("albert", "bart", "bert", "deberta", "deberta-v2", "distilbert", "electra", "gpt2", "gemma", "llama", "mistral"),
    *("mpnet", "mobilebert", "opt", "qwen2", "roberta", "xlm-roberta", "t5", "vit", "deit", "xlnet", "squeezebert"),
]
TABLES = [
    *("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE"),
    "IMAGE_CLASSIFICATION",
]


def task_classes() -> Iterator[Any]:
    for table in TABLES:
        names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES")
        for family in FAMILIES:
            held = names.get(family, ())
            for name in (held,) if isinstance(held, str) else held:
                yield pytest.param(family, name, id=name)


def small(family: str, name: str) -> Any:
    kind = type(transformers.AutoConfig.for_model(family))
    known = {"num_labels"} | set(kind().to_dict()) | set(getattr(kind, "attribute_map", {}))
    options = {key: value for key, value in SMALL.items() if key in known or key in inspect.signature(kind).parameters}
    if family == "mobilebert":
        options |= {"intra_bottleneck_size": 8, "true_hidden_size": 8, "embedding_size": 8, "hidden_size": 8}
    if family == "squeezebert":
        options |= dict.fromkeys(("q_groups", "k_groups", "v_groups", "post_attention_groups"), 2)
        options |= {"intermediate_groups": 2, "output_groups": 2}
    if family == "opt":
        options |= {"ffn_dim": 12, "word_embed_proj_dim": 8}
    if name.endswith("QuestionAnswering"):
        options["num_labels"] = 2
    if family == "t5":
        options["decoder_start_token_id"] = 0
    if family == "xlnet":
        options |= {"d_inner": 12, "d_head": 4}
    return getattr(transformers, name)(kind(**options)).eval()


def beside_backbone(model: nn.Module) -> dict[str, Tensor]:
    """By the keys alone: what `from_pretrained` of the backbone's checkpoint would have to make up."""
    prefix = f"{model.base_model_prefix}."
    return {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(prefix)}


@pytest.mark.parametrize(("family", "name"), list(task_classes()))
def test_auto_takes_all_that_is_new_to_a_task_class(family: str, name: str) -> None:
    model = small(family, name)
    new = {key for key in beside_backbone(model) if name != "T5ForQuestionAnswering" or key.startswith("qa_outputs.")}
    assert new
    getattr(model, model.base_model_prefix, model).probe = nn.Linear(2, 2)
    planned = glora.plan(model, ["probe"], LORA, trainable="auto")
    assert {f"{head.path}.{tensor}" for head in planned.heads for tensor in head.owner.tensors} == new


TEXT = [
    ("bert", "BertForSequenceClassification"),
    ("distilbert", "DistilBertForSequenceClassification"),
    ("deberta-v2", "DebertaV2ForSequenceClassification"),
    ("mpnet", "MPNetForSequenceClassification"),
    ("llama", "LlamaForSequenceClassification"),
    ("roberta", "RobertaForTokenClassification"),
]


@pytest.mark.parametrize(("family", "name"), TEXT)
def test_a_head_that_is_new_to_both_models_is_not_lost(family: str, name: str, tmp_path: Path) -> None:
    tokens = torch.tensor([[0, 5, 9, 7, 2]])
    torch.manual_seed(0)
    model = small(family, name)
    other = small(family, name)
    getattr(other, other.base_model_prefix).load_state_dict(getattr(model, model.base_model_prefix).state_dict())
    attach(model, trainable="auto")
    with torch.no_grad():
        for parameter in glora.parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    glora.save(model, tmp_path)
    glora.load(other, tmp_path, strict=True)
    assert same_outputs(other(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(("family", "name"), TEXT)
@pytest.mark.parametrize("targets", ["all-linear", ".*", lambda *_: True], ids=["all", "regex", "predicate"])
def test_an_adapted_head_is_said_once_by_name(family: str, name: str, targets: Any, tmp_path: Path) -> None:
    model = small(family, name)
    new = {key.rpartition(".")[0] for key in beside_backbone(model)}
    linear = [path for path, module in model.named_modules() if path in new and isinstance(module, nn.Linear)]
    heads = [message for message in warned(lambda: glora.apply(model, targets, LORA)) if "may be a head" in message]
    (message,) = heads
    assert all(path in message for path in linear)
    assert 'trainable="auto"' in message
    # What it warns of: the file does not hold the head, and says so when it is loaded.
    glora.save(model, tmp_path)
    other = small(family, name)
    base = {key: tensor for key, tensor in glora.base_state_dict(model).items() if key.rpartition(".")[0] not in linear}
    other.load_state_dict(base, strict=False)
    with pytest.warns(UserWarning, match=linear[0]):
        glora.load(other, tmp_path)


@pytest.mark.parametrize("options", [{"trainable": "auto"}, {"exclude": ["classifier"]}, {"trainable": ["classifier"]}])
def test_what_the_message_advises_silences_it(options: dict[str, Any]) -> None:
    assert warned(lambda: glora.apply(small("bert", "BertForSequenceClassification"), config=LORA, **options)) == []


def test_targets_that_name_the_head_need_no_word() -> None:
    model = small("bert", "BertForSequenceClassification")
    assert warned(lambda: glora.apply(model, ["query", "classifier"], LORA)) == []
    model = small("bert", "BertForSequenceClassification")
    assert warned(lambda: glora.apply(model, ".*query", LORA)) == []


LANGUAGE = [
    ("bert", "BertForMaskedLM"),
    ("bert", "BertModel"),
    ("bart", "BartForConditionalGeneration"),
    ("gpt2", "GPT2LMHeadModel"),
    ("llama", "LlamaForCausalLM"),
    ("mistral", "MistralForCausalLM"),
    ("t5", "T5ForConditionalGeneration"),
    ("vit", "ViTModel"),
]


@pytest.mark.parametrize(("family", "name"), [row for row in LANGUAGE if row[0] != "gpt2"])
def test_no_false_alarm_of_a_model_without_a_task_head(family: str, name: str) -> None:
    messages = warned(lambda: glora.apply(small(family, name), "all-linear", LORA))
    assert not [message for message in messages if "may be a head" in message]


@pytest.mark.parametrize(("family", "name"), LANGUAGE)
def test_auto_is_refused_where_there_is_no_task_head(family: str, name: str) -> None:
    model = small(family, name)
    path = next(path for path, module in model.named_modules() if isinstance(module, nn.Linear))
    refused(model, f"trainable='auto' takes.*this {name} has none.*Name the modules", [path], trainable="auto")


def test_a_task_class_inside_another_module_has_its_head() -> None:
    model = nn.ModuleDict({"inner": small("bert", "BertForSequenceClassification"), "classifier": nn.Linear(5, 2)})
    planned = glora.plan(model, ["query"], trainable="auto", config=glora.GLoRAConfig.glora())
    assert [head.path for head in planned.heads] == ["inner.classifier"]


# Models that are not transformers'.


def plain(name: str, outputs: int = 3) -> nn.Module:
    return nn.ModuleDict({"embed": nn.Embedding(7, 4), "body": nn.Linear(4, 4), name: nn.Linear(4, outputs)})


@pytest.mark.parametrize("name", ["classifier", "score", "head", "heads"])
def test_the_last_linear_layer_of_such_a_name_is_said(name: str) -> None:
    (message,) = warned(lambda: glora.apply(plain(name), config=LORA))
    assert f"trainable=['{name}'] trains it" in message
    assert warned(lambda: glora.apply(plain(name), config=LORA, trainable=[name])) == []
    assert warned(lambda: glora.apply(plain(name), config=LORA, exclude=[name])) == []


def test_other_names_other_places_and_vocabularies_are_not() -> None:
    models = [plain("lm_head"), plain("out"), plain("head", 7), Net(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))]
    models.append(nn.ModuleDict({"head": nn.Linear(4, 4), "body": nn.Linear(4, 4)}))
    for model in models:
        assert warned(lambda model=model: glora.apply(model, config=LORA)) == []


# Tied embeddings.


@pytest.mark.parametrize(
    ("family", "name", "embedding"),
    [
        ("llama", "LlamaForCausalLM", "model.embed_tokens"),
        ("opt", "OPTForCausalLM", "model.decoder.embed_tokens"),
        ("t5", "T5ForConditionalGeneration", "shared"),
        ("bart", "BartForConditionalGeneration", "model.shared"),
    ],
)
def test_new_tokens_train_through_a_tied_embedding(family: str, name: str, embedding: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small(family, name)
    if not model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.resize_token_embeddings(34, mean_resizing=False)
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    inputs = {"input_ids": torch.tensor([[3, 32, 33, 5]]), "labels": torch.tensor([[32, 33, 5, 3]])}
    linear = [path for path, module in model.named_modules() if type(module) is nn.Linear]
    targets = [path for path in linear if path != "lm_head"][:1]
    attach(model, RANDOM, targets=targets, trainable=[embedding])
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    optimizer = torch.optim.SGD(glora.parameters(model), 1.0)
    first = model(**inputs).loss
    for _ in range(5):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    wanted = model(**inputs)
    assert wanted.loss < first
    glora.save(model, tmp_path / "adapter")
    with glora.merged(model):
        model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(**inputs).logits, wanted.logits)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    glora.remove(model)
    assert all(torch.equal(tensor, base[key]) for key, tensor in model.state_dict().items())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    glora.load(model, tmp_path / "adapter", strict=True)
    torch.testing.assert_close(model(**inputs).logits, wanted.logits)
