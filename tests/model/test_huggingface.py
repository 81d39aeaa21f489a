"""What the library knows of transformers, without its models: output embeddings, new heads, `save_pretrained`."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict

import pytest
import torch
from torch import nn

import glora
from glora.model.huggingface import task_heads
from glora.model.walk import owners
from tests.helpers.calls import LORA, chosen, warned
from tests.helpers.models import ALL_OF_NET, Net


class WithOutputs(Net):
    def get_output_embeddings(self) -> nn.Module | None:
        return self.head


def test_all_linear_alone_leaves_out_the_output_embeddings() -> None:
    for model in (WithOutputs(), nn.Sequential(WithOutputs())):
        planned = glora.plan(model, config=glora.GLoRAConfig.glora())
        assert len(planned.layers) == 4
        (skipped,) = planned.skipped
        assert (skipped.path.endswith("head"), skipped.reason) == (True, "output embeddings")
    assert "head" in chosen(WithOutputs(), ".*")
    assert "head" in chosen(WithOutputs(), ["head"])
    assert "head" in chosen(WithOutputs(), lambda *_: True)


def test_a_tied_output_embedding_is_left_out_without_a_warning() -> None:
    model = WithOutputs()
    model.head.weight = model.embed.weight
    assert warned(lambda: glora.apply(model, config=glora.GLoRAConfig.glora())) == []


def test_a_model_that_has_no_output_embeddings_may_say_so() -> None:
    class Without(Net):
        def get_output_embeddings(self) -> None:
            return None

    class Stub(Net):
        def get_output_embeddings(self) -> None:
            raise NotImplementedError

    assert chosen(Without()) == chosen(Stub()) == ALL_OF_NET


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_of_a_language_model_leaves_out_its_head(tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config)
    glora.apply(model, config=LORA)
    projections = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    projections += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    expected = [f"model.layers.0.{path}.B.{factor}" for path in projections for factor in ("left", "right")]
    assert list(glora.state_dict(model)) == expected
    assert type(model.lm_head) is nn.Linear


class Task(nn.Module):
    """What a task class is: a backbone by name, and what is new beside it."""

    base_model_prefix = "body"

    def __init__(self, labels: int = 3) -> None:
        super().__init__()
        self.body, self.classifier = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4)), nn.Linear(4, labels)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.body(tokens).mean(1))


class Vocabulary(Task):
    """A language model: as many outputs as words, over a head that was trained with it."""

    def __init__(self) -> None:
        super().__init__(labels=10)

    def get_output_embeddings(self) -> nn.Module:
        return self.classifier


class Savable(nn.Sequential):
    """Writes its state dict, as `save_pretrained` does."""

    def save_pretrained(self, state_dict: dict[str, torch.Tensor] | None = None) -> list[str]:
        return list(self.state_dict() if state_dict is None else state_dict)


def test_what_a_task_class_has_beside_its_backbone_is_its_head() -> None:
    assert [owner.path for owner in task_heads(owners(Task()))] == ["classifier"]
    assert [owner.path for owner in task_heads(owners(nn.Sequential(Task())))] == ["0.classifier"]
    assert task_heads(owners(Vocabulary())) == []
    assert task_heads(owners(nn.Sequential(nn.Linear(2, 2)))) == []


def test_auto_trains_the_head_and_is_refused_where_there_is_none() -> None:
    model = glora.apply(Task(), config=LORA, trainable="auto")
    assert [key for key in glora.state_dict(model) if key.startswith("classifier")] == [
        "classifier.weight",
        "classifier.bias",
    ]
    with pytest.raises(ValueError, match="Vocabulary has none.*Name the modules"):
        glora.plan(Vocabulary(), trainable="auto", config=glora.GLoRAConfig.glora())


def test_a_new_head_that_is_swept_in_is_warned_of_and_one_that_is_named_is_not() -> None:
    (message,) = warned(lambda: glora.apply(Task(), config=glora.GLoRAConfig.glora()))
    assert re.search(r'classifier may be a head that is new.*trainable="auto"', message)
    assert warned(lambda: glora.apply(Task(), ["1", "classifier"], config=glora.GLoRAConfig.glora())) == []
    assert warned(lambda: glora.apply(Vocabulary(), config=glora.GLoRAConfig.glora())) == []


def test_without_a_backbone_the_last_linear_layer_is_a_head_by_its_name() -> None:
    def warned_of(*names: str) -> list[str]:
        model = nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in names))
        return warned(lambda: glora.apply(model, config=LORA))

    (message,) = warned_of("body", "classifier")
    assert re.search(r"classifier may be a head that is new.*trainable=\['classifier'\]", message)
    assert warned_of("classifier", "body") == []


def test_save_pretrained_writes_plain_keys_or_nothing() -> None:
    model = Savable(nn.Linear(4, 3))
    keys = model.save_pretrained()
    glora.apply(model, config=LORA)
    plain = glora.base_state_dict(model)
    for given in ({}, {"state_dict": model.state_dict()}):
        with pytest.raises(RuntimeError, match="must have the model's plain keys.*Nothing was written"):
            model.save_pretrained(**given)
    assert sorted(model.save_pretrained(state_dict=plain)) == sorted(keys)
    with glora.merged(model):
        assert model.save_pretrained() == keys
    replica = copy.deepcopy(model)
    glora.remove(model)
    assert model.save_pretrained() == keys
    assert "save_pretrained" not in vars(model)
    with pytest.raises(RuntimeError, match="plain keys"):
        replica.save_pretrained()
