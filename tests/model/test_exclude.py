"""`exclude=` and `trainable=`: the grammar of targets, and they win over them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from torch.nn.utils import parametrizations

import glora
from tests.helpers.calls import LORA, refused
from tests.helpers.models import ALL_OF_NET, Net


@pytest.mark.parametrize(
    "exclude",
    ["head", ["head"], lambda path, _module: path == "head", r"he.*"],
    ids=["regex", "list", "predicate", "wild regex"],
)
@pytest.mark.parametrize("targets", ["all-linear", ".*", ["q_proj", "k_proj", "head"], lambda *_: True, {".*": LORA}])
def test_exclude_takes_the_same_grammar_and_wins_over_targets(targets: Any, exclude: Any) -> None:
    planned = glora.plan(Net(), targets, exclude=exclude)
    assert [layer.path for layer in planned.layers] == ALL_OF_NET[:4]
    assert [(skipped.path, skipped.reason) for skipped in planned.skipped] == [("head", "excluded")]


def test_exclude_refuses_what_matches_nothing() -> None:
    refused(Net(), r"exclude= .*'tail' matches none", exclude=["tail"])
    refused(Net(), r"exclude= .*'q_proj' matches none.*list", exclude="q_proj")
    refused(Net(), r"exclude= .*only Block", exclude=["layers.0"])
    refused(Net(), r"exclude= .*False for all", exclude=lambda *_: False)
    refused(Net(), r"exclude=", exclude={"head": LORA})


def test_excluding_every_target_leaves_nothing_to_train() -> None:
    refused(Net(), "something to train.*excluded", ["head"], exclude=["head"])
    refused(Net(), "something to train", exclude="all-linear")


def heads(model: nn.Module, trainable: Any) -> list[str]:
    return [head.path for head in glora.plan(model, ["layers.0.q_proj"], trainable=trainable).heads]


def test_trainable_takes_the_same_grammar_over_all_modules_and_modules_themselves() -> None:
    model = Net()
    assert heads(model, ["norm"]) == ["layers.0.norm", "layers.1.norm"]
    assert heads(model, r"layers\.1\.norm|head") == ["layers.1.norm", "head"]
    assert heads(model, lambda _path, module: isinstance(module, nn.Embedding)) == ["embed"]
    assert heads(model, model.head) == ["head"]
    assert heads(model, [model.head, "embed"]) == ["embed", "head"]
    assert heads(model, ["layers.1"]) == ["layers.1.q_proj", "layers.1.k_proj", "layers.1.norm"]


def test_trainable_wins_over_targets() -> None:
    model = Net()
    planned = glora.plan(model, ["q_proj", "head"], trainable=["head"])
    assert [layer.path for layer in planned.layers] == ["layers.0.q_proj", "layers.1.q_proj"]
    assert [(skipped.path, skipped.reason) for skipped in planned.skipped] == [("head", "trainable as a whole")]
    glora.apply(model, ["q_proj", "head"], trainable=["head"])
    assert [key for key in glora.state_dict(model) if key.startswith("head")] == ["head.weight", "head.bias"]


def test_trainable_refuses_what_it_cannot_train() -> None:
    model = Net()
    refused(model, r"trainable= .*'tail' matches none", trainable=["tail"])
    refused(model, r"trainable= .*'norm' matches none.*list", trainable="norm")
    refused(model, r"trainable= .*False for all", trainable=lambda *_: False)
    refused(model, r"trainable= .*'act' has none", trainable=["act"])
    refused(model, r"trainable= .*outside it", trainable=nn.Linear(4, 10))
    refused(model, r"trainable= .*outside it", trainable=[model.head, nn.Linear(4, 10)])
    refused(model, r"trainable=", trainable=3)
    refused(model, r"trainable=", trainable=[3])


def test_a_head_that_is_tied_by_its_memory_alone_is_refused() -> None:
    model = Net()
    model.head.weight = nn.Parameter(model.embed.weight.detach())
    refused(model, "'head' is not: .*tied to embed.weight.*untie", ["q_proj"], trainable=["head"])
    refused(model, "'embed' is not: .*tied to head.weight.*untie", ["q_proj"], trainable=["embed"])


def test_a_parametrized_or_lazy_head_is_refused() -> None:
    model = Net()
    parametrizations.weight_norm(model.head)
    refused(model, "'head' is not: .*parametrized", ["q_proj"], trainable=["head"])
    model.head = nn.LazyLinear(10)
    refused(model, "'head' is not: .*lazy.*one batch", ["q_proj"], trainable=["head"])
