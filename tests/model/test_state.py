"""`glora.state_dict` and `load_state_dict`: keys, all or nothing; `base_state_dict`: the plain model's."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import glora
from glora import GLoRAConfig
from tests.helpers.calls import RANDOM, attach
from tests.helpers.models import TOKENS, attached, build, in_states, two
from tests.helpers.state import clones, identities, other_values, same, same_outputs, unchanged
from tests.helpers.strategies import configs


def test_keys_begin_with_the_modules_path() -> None:
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"q_proj": nn.Linear(3, 5)}), "rest": nn.Linear(2, 2)})
    glora.apply(model, ["q_proj"], GLoRAConfig.glora(B="none", C="none", D="constant"))
    assert list(glora.state_dict(model)) == [
        "encoder.q_proj.A.left",
        "encoder.q_proj.A.right",
        "encoder.q_proj.A.balance",
        "encoder.q_proj.D.value",
        "encoder.q_proj.E.value",
    ]


def test_a_state_dict_is_detached_and_shares_the_adapters_memory() -> None:
    layer = glora.apply(nn.Linear(3, 5), config=glora.GLoRAConfig.glora())
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


@given(
    config=configs(),
    alpha=st.sampled_from([None, 1.0, 6.0]),
    product=st.sampled_from(["hadamard", "matmul"]),
    saved=st.booleans(),
    strict=st.booleans(),
)
@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "model"])
def test_tensors_go_only_where_they_are_the_same_adapter(
    config: GLoRAConfig, alpha: float | None, product: Any, saved: bool, strict: bool, whole: bool
) -> None:
    source, other = (
        attach(nn.Sequential(nn.Linear(3, 3)), each)
        for each in (config, dataclasses.replace(config, alpha=alpha, product=product))
    )
    other[0].load_state_dict(glora.base_state_dict(source[0]))
    state_dict = source.state_dict() if whole else glora.state_dict(source)
    if saved:
        torch.save(state_dict, file := io.BytesIO())
        state_dict = torch.load(io.BytesIO(file.getvalue()), weights_only=True)

    def load(into: nn.Module, given: dict[str, Tensor], strict: bool = True) -> nn.Module:
        into.load_state_dict(given, strict=strict) if whole else glora.load_state_dict(into, given, strict=strict)
        return into[0]

    own = other.state_dict() if whole else glora.state_dict(other)
    fits = {key: t.shape for key, t in own.items()} == {key: t.shape for key, t in state_dict.items()}
    if fits and same_tensors(load(copy.deepcopy(other), dict(state_dict)), source[0]):
        assert same_tensors(load(other, state_dict, strict), source[0])
        return
    with pytest.raises(RuntimeError if whole else ValueError, match="alpha / rank|product|shape|missing|size mismatch"):
        load(other, state_dict, strict)


def same_tensors(layer: nn.Module, other: nn.Module) -> bool:
    return torch.equal(layer.weight, other.weight) and torch.equal(layer.bias, other.bias)


def test_loading_writes_into_the_named_adapter_alone() -> None:
    model = build()
    two(model)
    other, new = clones(glora.state_dict(model, "b")), other_values(glora.state_dict(model, "a"))
    glora.load_state_dict(model, new, "a")
    assert same(glora.state_dict(model, "a"), new)
    assert same(glora.state_dict(model, "b"), other)
    assert glora.adapters(model) == {"a": 0.0, "b": 1.0}


def test_loading_copies_and_casts_to_the_adapters_dtype() -> None:
    layer = glora.apply(nn.Linear(3, 5), config=glora.GLoRAConfig.glora())
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


def test_an_adapter_on_the_meta_device_is_not_written_into() -> None:
    with torch.device("meta"):
        model = attach(nn.Linear(4, 3), RANDOM)
    given = glora.state_dict(attach(nn.Linear(4, 3), RANDOM))
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"on the meta device.*to_empty"):
            glora.load_state_dict(model, given, strict=strict)
    glora.load_state_dict(model.to_empty(device="cpu"), given)
    assert torch.equal(glora.state_dict(model)["A.left"], given["A.left"])


def test_a_complex_head_loads_its_own_state() -> None:
    class Phase(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Parameter(torch.ones(4, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.turn).real

    model = glora.apply(
        nn.Sequential(nn.Linear(4, 4), Phase()), ["0"], trainable=["1"], config=glora.GLoRAConfig.glora()
    )
    glora.load_state_dict(model, glora.state_dict(model))


@attached
@in_states
@pytest.mark.parametrize(
    "wrap", [lambda model: model, AveragedModel, torch.compile], ids=["bare", "averaged", "compiled"]
)
def test_the_base_state_dict_is_the_plain_models(
    how: Callable[[nn.Module], object],
    state: Callable[[nn.Module], AbstractContextManager[object]],
    wrap: Callable[[nn.Module], Any],
) -> None:
    plain = build()
    model = wrap(copy.deepcopy(plain))
    how(model)
    with state(model):
        assert same(glora.base_state_dict(model), plain.state_dict())
        assert build().load_state_dict(glora.base_state_dict(model), strict=True) == ([], [])
    assert same(glora.base_state_dict(model), plain.state_dict())


def test_the_base_state_dict_of_an_averaged_adapted_model_is_the_plain_models() -> None:
    plain = build()
    model = copy.deepcopy(plain)
    attach(model, trainable=["norm", "head"])
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    assert same(glora.base_state_dict(averaged), plain.state_dict())
    assert glora.state_dict(averaged).keys() == glora.state_dict(model).keys()


def test_training_leaves_the_base_state_dict_as_it_was() -> None:
    model = build()
    plain = clones(model.state_dict())
    attach(model, trainable=["norm", "head"])
    optimizer = torch.optim.SGD(glora.parameters(model), lr=0.1)
    before = clones(glora.state_dict(model))
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(TOKENS).square().sum().backward()
        optimizer.step()
    moved = {key for key, tensor in glora.state_dict(model).items() if not torch.equal(tensor, before[key])}
    # Not all: a norm in training subtracts the mean, so the bias in front of it gets no gradient.
    assert moved >= {"first.A.left", "second.B.left", "norm.weight", "norm.running_mean", "head.weight", "head.bias"}
    assert same(glora.base_state_dict(model), plain)
    with glora.merged(model):
        assert same(glora.base_state_dict(model), plain)


def test_the_base_state_dict_of_a_plain_model_is_its_state_dict() -> None:
    model = build()
    assert same(glora.base_state_dict(model), model.state_dict())


def test_a_layer_that_torch_has_merged_gives_what_it_holds() -> None:
    model = build()
    plain = clones(model.state_dict())
    attach(model)
    merged = model.first.weight.detach().clone()
    parametrize.remove_parametrizations(model.first, "weight")
    assert same(glora.base_state_dict(model), plain | {"first.weight": merged})


@pytest.mark.parametrize("strict", [True, False])
def test_strict_false_is_advised_only_where_it_helps(strict: bool) -> None:
    layer = glora.apply(nn.Linear(4, 5), config=glora.GLoRAConfig.glora())
    with pytest.raises(ValueError, match="Attach with the config that it was saved under") as caught:
        glora.load_state_dict(layer, {**glora.state_dict(layer), "E.value": torch.ones(6)}, strict=strict)
    assert ("strict=False" in str(caught.value)) is strict
