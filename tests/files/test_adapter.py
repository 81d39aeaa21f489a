"""Adapter files: what is saved comes back, and nothing is lost half way."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import glora
from tests.helpers.files import saved, small_model, stored_sum
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
    glora.load(small_model(), tmp_path)  # with no warning
