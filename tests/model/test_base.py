"""An adapter knows the base that it was trained beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from glora import GLoRAConfig
from tests.helpers.calls import RANDOM, attach, quiet, warned
from tests.helpers.files import copied_without_base
from tests.helpers.models import build
from tests.helpers.state import unchanged
from tests.helpers.strategies import DTYPES, Case, cases


@given(cases(max_adapters=1), st.sampled_from(DTYPES))
def test_the_same_base_is_known_in_every_dtype(tmp_path_factory: Any, case: Case, dtype: torch.dtype) -> None:
    directory = tmp_path_factory.mktemp("adapter")
    glora.save(case.build(), directory)
    glora.load(case.plain().to(dtype), directory, strict=True)


@given(cases(max_adapters=1, max_size=(9, 9)))
def test_another_base_is_an_error_if_strict_and_a_warning_if_not(tmp_path_factory: Any, case: Case) -> None:
    directory = tmp_path_factory.mktemp("adapter")
    glora.save(case.build(), directory)
    other = case.plain()
    with torch.no_grad():
        other.weight.mul_(-1)
    with unchanged(other), pytest.raises(glora.AdapterFileError, match=r"in weight\..*Nothing was changed"):
        glora.load(other, directory, strict=True)
    (message,) = warned(lambda: glora.load(other, directory))
    assert "strict=True makes this an error" in message
    assert glora.adapters(other) == {"default": 1.0}


def test_a_head_that_was_new_to_both_models_is_named(tmp_path: Path) -> None:
    model, other = build(), build()
    other.load_state_dict(model.state_dict())
    other.head.reset_parameters()
    attach(model)
    glora.save(model, tmp_path)
    with pytest.warns(UserWarning, match=r"in head\.weight, head\.bias\. .*trainable="):
        glora.load(other, tmp_path)
    torch.testing.assert_close(
        glora.base_state_dict(other)["first.weight"], glora.base_state_dict(model)["first.weight"]
    )


def test_a_head_that_trains_as_a_whole_may_have_any_base(tmp_path: Path) -> None:
    model, other = build(), build()
    other.load_state_dict(model.state_dict())
    other.head.reset_parameters()
    attach(model, trainable=["head"])
    glora.save(model, tmp_path)
    glora.load(other, tmp_path, strict=True)
    assert torch.equal(other.head.weight, model.head.weight)


def test_a_second_adapter_is_compared_with_the_frozen_base_and_not_with_what_acts(tmp_path: Path) -> None:
    model = build()
    attach(model, name="a")
    attach(model, name="b")
    glora.save(model, tmp_path, "a")
    glora.load(model, tmp_path, "c", strict=True)
    with glora.merged(model):
        glora.save(model, tmp_path, "b")
    glora.load(model, tmp_path, "d", strict=True)


def test_what_has_no_memory_is_neither_described_nor_compared(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    attach(model)
    glora.save(model, tmp_path)
    with torch.device("meta"):
        bare = nn.Sequential(nn.Linear(3, 2))
    glora.load(bare, tmp_path, strict=True)
    glora.save(bare, tmp_path / "again")  # its factors are on the CPU
    assert "base" not in json.loads((tmp_path / "again" / "glora_config.json").read_text())


def test_a_created_bias_is_no_part_of_the_base(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    attach(model, GLoRAConfig.glora(init="random", create_bias=True))
    glora.save(model, tmp_path)
    assert list(json.loads((tmp_path / "glora_config.json").read_text())["base"]) == ["0.weight"]
    plain = nn.Sequential(nn.Linear(3, 2, bias=False))
    plain[0].weight = nn.Parameter(glora.base_state_dict(model)["0.weight"])
    glora.load(plain, tmp_path, strict=True)


def test_a_file_from_before_fingerprints_loads_with_no_word(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    attach(model)
    glora.save(model, tmp_path / "new")
    copied_without_base(tmp_path / "new", tmp_path / "old")
    assert warned(lambda: glora.load(nn.Sequential(nn.Linear(3, 2)), tmp_path / "old", strict=True)) == []


@pytest.mark.parametrize("base", [{"0.weight": []}, {"0.weight": ["x"]}, [1], {"0.weight": 3.0}, {"0.weight": [1e999]}])
def test_fingerprints_that_are_none_are_damage(tmp_path: Path, base: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    attach(model)
    glora.save(model, tmp_path / "new")
    copied_without_base(tmp_path / "new", tmp_path / "bad", base=base)
    with pytest.raises(glora.AdapterFileError, match="cannot be understood"):
        glora.load(nn.Sequential(nn.Linear(3, 2)), tmp_path / "bad")


def test_the_fingerprints_are_small(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    attach(model, RANDOM)
    glora.save(model, tmp_path / "with")
    copied_without_base(tmp_path / "with", tmp_path / "without")
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("with", "without")]
    assert sizes[0] - sizes[1] < 16 * 100  # bytes, for sixteen tensors


def test_a_layer_that_torchs_removal_has_baked_is_another_base(tmp_path: Path) -> None:
    model, plain = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2))
    plain.load_state_dict(model.state_dict())
    attach(model, GLoRAConfig.glora(C="none", init="random"))
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    with quiet():
        glora.save(model, tmp_path)
    with pytest.warns(UserWarning, match=r"in 0\.weight\."):
        glora.load(plain, tmp_path)
