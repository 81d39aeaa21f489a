"""Adapter files: what is saved comes back, and nothing is lost half way."""

from __future__ import annotations

import contextlib
import copy
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import glora
from tests.helpers.files import most_bytes_of_a_header, saved, small_model, stored_sum
from tests.helpers.state import same
from tests.helpers.strategies import Case, cases


@settings(max_examples=60)
@given(cases(max_adapters=1))
def test_load_attaches_and_fills_what_save_wrote(tmp_path_factory: Any, case: Case) -> None:
    directory = tmp_path_factory.mktemp("adapter")
    layer = case.build()
    name = next(iter(glora.adapters(layer)))
    glora.activate(layer, name)
    glora.save(layer, directory, name)
    other = glora.load(case.plain(), directory, "other", trainable=False)
    assert {k: v.dtype for k, v in glora.state_dict(other).items()} == {
        k: v.dtype for k, v in glora.state_dict(layer, name).items()
    }
    assert torch.equal(other.weight, layer.weight)
    assert other.bias is None or torch.equal(other.bias, layer.bias)
    assert not any(p.requires_grad for p in other.parameters())
    before = stored_sum(directory)
    glora.save(other, directory)
    assert stored_sum(directory) == before


def test_heads_and_created_biases_travel_along(tmp_path: Path) -> None:
    made = saved(tmp_path)
    other = glora.load(small_model(), tmp_path)
    x = torch.randn(6, 5)
    assert torch.equal(made.eval()(x), other.eval()(x))
    assert list(glora.state_dict(made)) == list(glora.state_dict(other))
    with glora.disabled(other):
        assert torch.equal(other(x), small_model().eval()(x))


def test_on_a_meta_model_the_tensors_wait_on_the_cpu(tmp_path: Path) -> None:
    made = saved(tmp_path)
    with torch.device("meta"):
        bare = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False))
    glora.load(bare, tmp_path)
    bare.load_state_dict(small_model().state_dict(), assign=True)
    x = torch.randn(6, 5)
    assert torch.equal(made.eval()(x), bare.eval()(x))


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    for other in (nn.Linear(5, 4), nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))):
        with pytest.raises(glora.AdapterFileError, match="nothing was changed"):
            glora.load(other, tmp_path)
        assert not glora.adapters(other)
    twice = glora.load(small_model(), tmp_path)
    with pytest.raises(ValueError, match="new to the model"):
        glora.load(twice, tmp_path)
    with pytest.raises(FileNotFoundError):
        glora.load(small_model(), tmp_path / "nowhere")


def test_the_readers_copy_warns_where_it_differs(tmp_path: Path) -> None:
    saved(tmp_path)
    copy = tmp_path / "glora_config.json"
    copy.write_text(copy.read_text().replace('"rank": 2', '"rank": 3', 1))
    with pytest.warns(UserWarning, match="which is what counts"):
        glora.load(small_model(), tmp_path)
    copy.write_text("{" * 100_000)
    with pytest.warns(UserWarning, match="which is what counts"):  # nothing depends on it, however damaged
        glora.load(small_model(), tmp_path)


@given(st.one_of(st.binary(), st.from_regex(r'\A\{"format_version": [1-9]{1,6000}\}', fullmatch=True).map(str.encode)))
def test_however_damaged_the_readers_copy_is_the_adapter_loads(tmp_path_factory: Any, data: bytes) -> None:
    directory = tmp_path_factory.mktemp("adapter")
    made = saved(directory)
    (directory / "glora_config.json").write_bytes(data)
    with pytest.warns(UserWarning, match="which is what counts"):
        loaded = glora.load(small_model(), directory)
    assert same(glora.state_dict(loaded), glora.state_dict(made))


def test_a_copy_under_its_earlier_name_is_read_and_goes_at_the_next_save(tmp_path: Path) -> None:
    made = saved(tmp_path)
    earlier = (tmp_path / "glora_config.json").rename(tmp_path / "adapter_config.json")
    glora.load(small_model(), tmp_path)  # with no warning: it says the same
    earlier.write_text("{}")
    with pytest.warns(UserWarning, match="adapter_config.json does not say"):
        glora.load(small_model(), tmp_path)
    glora.save(made, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_model.safetensors", "glora_config.json"]


def test_a_description_of_many_layers_is_read_again(tmp_path: Path) -> None:
    # As long as one of 69,120 layers (the experts of a large model), which takes longer to make.
    model = nn.ModuleDict({f"{number}{'m' * 2**20}": nn.Linear(1, 1, bias=False) for number in range(20)})
    plain = copy.deepcopy(model)
    glora.save(glora.apply(model, config=glora.GLoRAConfig.lora(rank=1, init="random")), tmp_path)
    assert (tmp_path / "glora_config.json").stat().st_size > 2**24
    assert len(glora.state_dict(glora.load(plain, tmp_path))) == 40


def test_more_layers_than_a_file_describes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    made = saved(tmp_path)
    before = stored_sum(tmp_path)
    with most_bytes_of_a_header(1000), pytest.raises(ValueError, match="fewer layers"):
        glora.save(made, tmp_path)
    assert stored_sum(tmp_path) == before
    # safetensors' own limit: it reads no header above 100 MB, and its newer versions write none.
    huge = glora.apply(nn.ModuleDict({"m" * 51_000_000: nn.Linear(1, 1)}), config=glora.GLoRAConfig.bitfit())
    with pytest.raises(ValueError, match="one safetensors file|fewer layers"):
        glora.save(huge, tmp_path / "huge")
    assert not (tmp_path / "huge").exists()


def test_a_save_removes_what_killed_saves_left_and_nothing_else(tmp_path: Path) -> None:
    digits = "0123456789abcdef" * 2
    stale = [f".adapter_model.safetensors.{digits}", f".glora_config.json.{digits}"]
    others = [
        f".adapter_model.safetensors.{digits[:-1]}",
        f".adapter_model.safetensors.{digits.upper()}",
        f".adapter_model.safetensors.{digits}.part",
        f".other.safetensors.{digits}",
        f"adapter_model.safetensors.{digits}",
        f".adapter_model_safetensors.{digits}",
    ]
    running = f".adapter_model.safetensors.{digits[::-1]}"  # of a save that goes on at the same time
    for name in (*stale, *others, running):
        (tmp_path / name).touch()
        if name != running:
            os.utime(tmp_path / name, times=(0, 0))
    saved(tmp_path)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {*others, running, "adapter_model.safetensors", "glora_config.json"}


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("count", range(1, 7))
def test_stopped_anywhere_the_old_adapter_or_the_new_one_is_there(tmp_path: Path, step: str, count: int) -> None:
    saved(tmp_path)
    old = stored_sum(tmp_path)
    real, calls = getattr(os, step), []

    def stop(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == count:
            raise KeyboardInterrupt
        return real(*args)

    with mock.patch.object(os, step, stop), contextlib.suppress(KeyboardInterrupt):
        saved(tmp_path, seed=1)
    saved(tmp_path / "new", seed=1)
    new = stored_sum(tmp_path / "new")
    # All bytes are on the disk (two flushes) before the first file is replaced; the copy is never another adapter's.
    replaced = count > (2 if step == "fsync" else 1)
    assert stored_sum(tmp_path) == (new if replaced else old)
    assert {file.name for file in tmp_path.iterdir()} <= {"new", "glora_config.json", "adapter_model.safetensors"}
    glora.load(small_model(seed=1 if replaced else 0), tmp_path)  # with no warning
