"""What the offline merge keeps of the base, and the bases and adapters that it refuses before anything has changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

import glora
from glora.__main__ import main
from tests.helpers.calls import RANDOM
from tests.helpers.files import raw_file, raw_tensors, sharded

# Safetensors' dtypes and their bits. torch has no F6 at all, and two F4 in one number.
DTYPES = {
    "BOOL": 8,
    "U8": 8,
    "I16": 16,
    "U16": 16,
    "I64": 64,
    "F16": 16,
    "F64": 64,
    "C64": 64,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@st.composite
def others(draw: st.DrawFn) -> dict[str, tuple[str, list[int], bytes]]:
    """Tensors that no adapter touches, of any dtype, shape and name."""
    found: dict[str, tuple[str, list[int], bytes]] = {}
    for name in draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=9), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = [*draw(st.lists(st.integers(0, 3), max_size=2)), *([8] if DTYPES[dtype] < 8 else [])]
        size = torch.Size(shape).numel() * DTYPES[dtype] // 8
        found[f"x.{name}"] = dtype, shape, draw(st.binary(min_size=size, max_size=size))
    return found


@given(others(), st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3), st.booleans(), st.booleans())
def test_what_no_adapter_touches_is_copied_and_the_file_is_as_safetensors_has_it(
    tmp_path_factory: Any, tensors: dict[str, Any], metadata: dict[str, str], bias: bool, shards: bool
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    model = nn.Sequential(nn.Linear(3, 5, bias=bias))
    (folder / "plain").write_bytes(save(model.state_dict()))
    raw_file(folder / "model-0.safetensors", tensors, metadata)
    raw_file(folder / "model-1.safetensors", raw_tensors(folder / "plain")[0], metadata)
    base = folder / "model.safetensors.index.json"
    said = dict.fromkeys(tensors, "model-0.safetensors") | dict.fromkeys(model.state_dict(), "model-1.safetensors")
    base.write_text(
        json.dumps({"metadata": {"total_size": 1, "total_parameters": 1, "note": "kept"}, "weight_map": said})
    )
    if not tensors:
        (folder / "model-0.safetensors").unlink()
    config = glora.GLoRAConfig.glora(init="random", create_bias=True)
    glora.save(glora.apply(model, config=config), folder / "adapter")
    out = folder / "out" / ("model.safetensors.index.json" if shards else "model.safetensors")
    assert main(["merge", str(base), str(folder / "adapter"), str(out)]) == 0
    found: dict[str, Any] = {}
    for file in out.parent.glob("*.safetensors"):
        own, kept, padding = raw_tensors(file)
        assert kept == metadata
        assert set(padding) <= {" "}
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
        with safe_open(file, framework="pt") as opened:
            assert set(opened.keys()) == set(own)
        start = 0
        for dtype, _, data in own.values():
            assert start % max(1, {**DTYPES, "F32": 32}[dtype] // 8) == 0  # readers view the bytes as numbers
            start += len(data)
        found |= own
    assert found.keys() == tensors.keys() | glora.merge(model).state_dict().keys()
    assert {key: found[key] for key in tensors} == tensors
    if shards:
        index = json.loads(out.read_text())
        assert index["metadata"] == {"total_size": sum(len(data) for _, _, data in found.values()), "note": "kept"}
        assert index["weight_map"] == said | {"0.bias": "model-1.safetensors"}


def merged(folder: Path, base: Path, model: nn.Module, capsys: pytest.CaptureFixture[str]) -> str:
    """The error of merging the model's adapter; no file is written."""
    glora.save(model, folder / "adapter")
    assert main(["merge", str(base), str(folder / "adapter"), str(folder / "out.safetensors")]) == 1
    assert not list(folder.glob("*out.safetensors*"))
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"weight": torch.zeros(6, 4), "bias": torch.zeros(6)}, "1.weight: shape (2, 4) where (6, 4) should be"),
        ({"weight": torch.zeros(4, 2), "bias": torch.zeros(2)}, "1.weight: shape (2, 4) where (4, 2) should be"),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2).long()}, "1.bias: torch.float32 where an integer"),
        ({"weight": torch.zeros(2, 4).to(torch.float8_e4m3fn), "bias": torch.zeros(2)}, "of the base is F8_E4M3"),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2), "scale": torch.zeros(2)}, "missing: 1.scale"),
        ({"weight": torch.zeros(2, 4)}, "does not have"),
    ],
)
def test_a_head_of_another_shape_or_kind_is_refused(
    own: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = glora.apply(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), ["0"], RANDOM, trainable=["1"])
    tensors = {**nn.Sequential(nn.Linear(4, 4)).state_dict(), **{f"1.{name}": own[name] for name in own}}
    save_file(tensors, tmp_path / "base.safetensors")
    assert message in merged(tmp_path, tmp_path / "base.safetensors", model, capsys)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"weight": torch.zeros(4, 4).char(), "bias": torch.zeros(4)}, "I8 (4, 4), no weight"),
        ({"weight": torch.zeros(4, 4, 1), "bias": torch.zeros(4)}, "(4, 4, 1), no weight"),
        ({"weight": torch.zeros(4, 4), "bias": torch.zeros(1)}, "(1,), no bias"),
        ({"weight": torch.zeros(4, 4), "bias": torch.zeros(4).to(torch.float8_e5m2)}, "F8_E5M2 (4,), no bias"),
        ({"weight": torch.zeros(4, 5), "bias": torch.zeros(4)}, "a weight of (4, 5)"),
        ({"weight": torch.zeros(4, 4)}, "no bias where a bias is adapted"),
    ],
)
def test_a_base_of_other_layers_is_refused(
    own: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({f"0.{name}": tensor for name, tensor in own.items()}, tmp_path / "base.safetensors")
    model = glora.apply(nn.Sequential(nn.Linear(4, 4)), config=RANDOM)
    assert message in merged(tmp_path, tmp_path / "base.safetensors", model, capsys)


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    index = sharded(tmp_path / "base", model)
    text = index.read_text()
    glora.apply(model, config=RANDOM)
    index.write_text(text.replace('"0.bias": "model-1', '"0.bias": "model-0'))
    assert "names 0.bias in shards that do not have them" in merged(tmp_path, index, model, capsys)
    index.write_text(text)
    first, second = (index.with_name(f"model-{number}.safetensors") for number in (0, 1))
    save_file({**load_file(first), "0.bias": torch.zeros(4)}, first)
    assert "'0.bias' is in two shards" in merged(tmp_path, index, model, capsys)
    second.unlink()
    assert "no file" in merged(tmp_path, index, model, capsys)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_merge_that_fails_late_leaves_the_earlier_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    index, out = sharded(tmp_path / "base", model), tmp_path / "out" / "model.safetensors.index.json"
    arguments = ["merge", str(index), str(tmp_path / "adapter"), str(out)]
    glora.save(glora.apply(model, config=RANDOM), tmp_path / "adapter")
    assert main(arguments) == 0
    before = contents(out.parent)
    assert len(before) == 3
    glora.state_dict(model)["1.B.left"].fill_(torch.inf)
    glora.save(model, tmp_path / "adapter")
    assert main(arguments) == 1
    assert "'1.weight' of the base" in capsys.readouterr().err
    assert contents(out.parent) == before


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_merge_that_is_killed_leaves_no_index_of_other_shards(tmp_path: Path, count: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    index, out = sharded(tmp_path / "base", model), tmp_path / "out" / "model.safetensors.index.json"
    arguments = ["merge", str(index), str(tmp_path / "adapter"), str(out)]
    glora.save(glora.apply(model, config=RANDOM), tmp_path / "adapter")
    assert main(arguments) == 0
    real, calls = os.replace, []

    def stop(*args: Any) -> None:
        calls.append(args)
        if len(calls) == count:
            raise KeyboardInterrupt
        real(*args)

    with mock.patch.object(os, "replace", stop):
        assert main(arguments) == 130
    assert sorted(contents(out.parent)) == ["model-0.safetensors", "model-1.safetensors"]
    assert main(arguments) == 0
    assert out.exists()
