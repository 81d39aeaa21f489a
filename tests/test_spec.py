"""An adapter apart from a model: what its tensors must be, and what is said where they are not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import glora
from glora.model.state import describe
from glora.spec import AdapterFileError, LayerSpec, TensorSpec, join, like, mismatches, report_other_base, tied_names
from tests.helpers.calls import attach
from tests.helpers.models import build
from tests.helpers.strategies import Case, cases, configs

PATHS = st.lists(st.sampled_from(["a", "b", "0"]), max_size=3).map(".".join)


@given(cases(max_adapters=1))
def test_a_layers_tensors_are_those_that_an_adapter_has(case: Case) -> None:
    layer = case.build()
    spec = describe(layer, None)
    (described,) = spec.layers.values()
    tensors = glora.state_dict(layer)
    assert {key: wanted.shape for key, wanted in described.tensors().items()} == {
        key: tuple(tensor.shape) for key, tensor in tensors.items()
    }
    assert described.parameters == sum(tensor.numel() for key, tensor in tensors.items() if key != "A.balance")
    assert list(mismatches(tensors, spec.wanted())) == []


@given(configs(needs="ABCDE"), st.integers(1, 9), st.integers(1, 9))
def test_a_size_that_is_not_known_fits_any(config: glora.GLoRAConfig, out: int, inp: int) -> None:
    known, unknown = LayerSpec(config, out, inp), LayerSpec(config)
    tensors = {key: torch.zeros(spec.shape) for key, spec in known.tensors().items() if spec.shape is not None}
    assert list(mismatches(tensors, known.tensors())) == list(mismatches(tensors, unknown.tensors())) == []
    assert unknown.tensors().keys() == known.tensors().keys()
    other = dataclasses.replace(known, out_features=out + 1, in_features=inp + 1).tensors()
    fit = {key for key in tensors if other[key] == known.tensors()[key]}
    assert {problem.split(":")[0] for problem in mismatches(tensors, other)} == tensors.keys() - fit


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.zeros(2, 4), "shape (2, 4) where (2, 3) should be"),
        (torch.zeros(2, 3, dtype=torch.int32), "torch.int32 where a floating dtype should be"),
        (torch.zeros(2, 3, dtype=torch.complex64), "torch.complex64 where a floating dtype should be"),
        (torch.zeros(2, 3).to_sparse(), "a tensor without data"),
        (torch.zeros(2, 3, device="meta"), "a tensor without data"),
        ([[0.0]], "a list where a tensor should be"),
    ],
    ids=["shape", "integer", "complex", "sparse", "meta", "list"],
)
def test_what_does_not_fit_is_said_in_one_sentence(tensor: Any, problem: str) -> None:
    (found,) = mismatches({"x": tensor}, {"x": like(torch.zeros(2, 3))})
    assert found.startswith(f"x: {problem}")


@given(st.sets(st.sampled_from("abcd")), st.sets(st.sampled_from("abcd")), st.sets(st.sampled_from("abcd")))
def test_every_key_is_there_and_no_other_unless_it_may_be(given: set[str], wanted: set[str], may: set[str]) -> None:
    tensors: dict[str, Tensor] = dict.fromkeys(sorted(given), torch.zeros(1))
    specs = dict.fromkeys(sorted(wanted), TensorSpec((1,)))
    said = list(mismatches(tensors, specs, optional=may))
    missing, left = sorted(wanted - given), sorted(given - wanted - may)
    assert said == [
        *([f"missing: {', '.join(missing)}"] if missing else []),
        *([f"unexpected: {', '.join(left)}"] if left else []),
    ]
    assert list(mismatches(tensors, specs, strict=False)) == []


@given(PATHS, st.sampled_from(["weight", "A.left"]))
def test_a_key_is_its_path_and_its_name(path: str, name: str) -> None:
    assert join(path, name) == f"{path}.{name}".lstrip(".")
    assert join(path, "") + name == join(path, name)
    assert tied_names({join(path, "weight"): "elsewhere"}, path) == ["weight"]


def test_another_base_is_a_warning_or_an_error_and_no_key_is_neither() -> None:
    report_other_base([], "file", strict=True, stacklevel=1)
    with pytest.warns(UserWarning, match=r"file was trained beside others than this base has in a\.weight"):
        report_other_base(["a.weight"], "file", strict=False, stacklevel=1)
    with pytest.raises(AdapterFileError, match="Nothing was changed"):
        report_other_base(["a.weight"], "file", strict=True, stacklevel=1)


def test_forms_rank_and_parameters_of_a_layer_are_those_of_the_plan() -> None:
    config = glora.GLoRAConfig.glora(A="vector", B="lora", rank=2)
    planned = {layer.path: layer for layer in glora.plan(build(), ["first"], config).layers}
    described = describe(attach(build(), config, targets=["first"]), None).layers
    assert described.keys() == planned.keys()
    for path, layer in planned.items():
        assert (layer.forms, layer.rank, layer.parameters) == (
            described[path].forms,
            described[path].rank,
            described[path].parameters,
        )
