"""`glora.state_dict` and `glora.load_state_dict`: keys, all or nothing."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from glora import GLoRAConfig
from tests.helpers.calls import RANDOM, attach
from tests.helpers.models import TOKENS, build, two
from tests.helpers.state import clones, identities, other_values, same, same_outputs, unchanged
from tests.helpers.strategies import configs


def test_keys_begin_with_the_modules_path() -> None:
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"q_proj": nn.Linear(3, 5)}), "rest": nn.Linear(2, 2)})
    glora.apply(model, ["q_proj"], GLoRAConfig(B="none", C="none", D="constant"))
    assert list(glora.state_dict(model)) == [
        "encoder.q_proj.A.left",
        "encoder.q_proj.A.right",
        "encoder.q_proj.D.value",
        "encoder.q_proj.E.value",
    ]


def test_a_state_dict_is_detached_and_shares_the_adapters_memory() -> None:
    layer = glora.apply(nn.Linear(3, 5))
    tensors = glora.state_dict(layer)
    assert not any(tensor.requires_grad for tensor in tensors.values())
    tensors["E.value"].fill_(2.0)
    assert dict(glora.named_parameters(layer))["E.value"].tolist() == [2.0] * 5


@given(config=configs(needs="ABCDE"), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_a_state_dict_carries_the_adapter_to_another_model(config: GLoRAConfig, dtype: torch.dtype) -> None:
    source = build().to(dtype)
    target = copy.deepcopy(source)
    attach(source, config, trainable=["norm"])
    attach(target, dataclasses.replace(config, init="identity"), trainable=["norm"])
    ids, base = identities(target), clones(glora.base_state_dict(target))
    carried = clones(glora.state_dict(source))
    assert glora.load_state_dict(target, carried) is target
    assert same(glora.state_dict(target), carried)
    assert same_outputs(target(TOKENS), source(TOKENS))
    assert identities(target) == ids
    assert same(glora.base_state_dict(target), base)


def test_loading_writes_into_the_named_adapter_alone() -> None:
    model = build()
    two(model)
    other, new = clones(glora.state_dict(model, "b")), other_values(glora.state_dict(model, "a"))
    glora.load_state_dict(model, new, "a")
    assert same(glora.state_dict(model, "a"), new)
    assert same(glora.state_dict(model, "b"), other)
    assert glora.adapters(model) == {"a": 0.0, "b": 1.0}


def test_loading_copies_and_casts_to_the_adapters_dtype() -> None:
    layer = glora.apply(nn.Linear(3, 5))
    new = {key: tensor.double() for key, tensor in other_values(glora.state_dict(layer)).items()}
    glora.load_state_dict(layer, new)
    wanted = {key: tensor.float() for key, tensor in new.items()}
    for tensor in new.values():
        tensor.zero_()
    assert same(glora.state_dict(layer), wanted)


def test_one_error_names_every_problem_and_nothing_is_written() -> None:
    model = build()
    attach(model, trainable=["head"])
    given = other_values(glora.state_dict(model))
    del given["first.A.left"], given["head.bias"]
    given["first.A.middle"] = torch.zeros(1)
    given["first.B.left"] = torch.zeros(6, 3)
    given["second.A.right"] = torch.zeros(2, 6, dtype=torch.int64)
    given["head.weight"] = torch.zeros(2, 3, dtype=torch.complex64)
    not_a_tensor: Any = [1.0]
    given["third.E.value"] = not_a_tensor
    with unchanged(model), pytest.raises(ValueError, match="nothing was written") as refusal:
        glora.load_state_dict(model, given)
    message = str(refusal.value)
    for problem in (
        "missing: first.A.left, head.bias",
        "unexpected: first.A.middle",
        "first.B.left: shape (6, 3) where (6, 2) should be",
        "second.A.right: torch.int64 where a floating dtype",
        "head.weight: torch.complex64 where a floating dtype",
        "third.E.value: a list where a tensor",
    ):
        assert problem in message


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(5, 1),
        torch.zeros(1),  # would broadcast
        torch.zeros(()),
        torch.zeros(5, dtype=torch.int32),
        torch.zeros(5, dtype=torch.bool),
        torch.zeros(5, dtype=torch.complex64),
        torch.zeros(5, device="meta"),  # holds nothing to copy
        torch.zeros(5).to_sparse(),
        None,
    ],
    ids=["column", "broadcast", "scalar", "int", "bool", "complex", "meta", "sparse", "None"],
)
def test_a_tensor_that_cannot_be_written_leaves_the_others_unwritten(value: Any, strict: bool) -> None:
    layer = glora.apply(nn.Linear(3, 5), config=RANDOM)
    given = other_values(glora.state_dict(layer)) | {"E.value": value}
    with unchanged(layer), pytest.raises(ValueError, match=r"E\.value"):
        glora.load_state_dict(layer, given, strict=strict)


def test_not_strict_writes_the_keys_that_both_have() -> None:
    layer = glora.apply(nn.Linear(3, 5), config=RANDOM)
    before = clones(glora.state_dict(layer))
    glora.load_state_dict(layer, {"E.value": torch.ones(5), "elsewhere": torch.ones(1)}, strict=False)
    assert same(glora.state_dict(layer), before | {"E.value": torch.ones(5)})
