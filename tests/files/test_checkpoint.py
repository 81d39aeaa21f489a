"""A checkpoint's file merged tensor by tensor, without a model: the bits of `glora.merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from torch import nn

import glora
from glora.__main__ import main
from tests.helpers import internals
from tests.helpers.files import copied_without_base, half_precision_model, saved_half_precision, sharded
from tests.helpers.strategies import Case, cases


@pytest.mark.parametrize("shape", ["one file", "sharded", "sharded into one"])
def test_merge_gives_the_bits_of_glora_merge(shape: str, tmp_path: Path) -> None:
    model = saved_half_precision(tmp_path / "adapter", create_bias=True)
    save_file(half_precision_model().state_dict(), tmp_path / "base.safetensors")
    base = tmp_path / "base.safetensors" if shape == "one file" else sharded(tmp_path / "base", half_precision_model())
    before = {file: file.read_bytes() for file in base.parent.glob("*.safetensors")}
    out = tmp_path / "out" / ("model.safetensors.index.json" if shape == "sharded" else "model.safetensors")
    assert main(["merge", str(base), str(tmp_path / "adapter"), str(out)]) == 0
    wanted = glora.merge(model).state_dict()
    files = sorted(out.parent.glob("*.safetensors"))
    found = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert found.keys() == wanted.keys()
    assert all(found[key].dtype == wanted[key].dtype and torch.equal(found[key], wanted[key]) for key in wanted)
    assert all(file.read_bytes() == data for file, data in before.items())
    if shape == "sharded":
        assert json.loads(out.read_text())["weight_map"].keys() == wanted.keys()
    else:
        # safetensors' own order, so that the tensors' bytes are its file's.
        save_file(wanted, tmp_path / "wanted.safetensors")
        size = sum(tensor.nbytes for tensor in wanted.values())
        assert out.read_bytes()[-size:] == (tmp_path / "wanted.safetensors").read_bytes()[-size:]


@settings(max_examples=60)
@given(cases(max_adapters=1))
def test_every_form_is_merged_to_the_bit(tmp_path_factory: Any, case: Case) -> None:
    folder = tmp_path_factory.mktemp("merge")
    layer = case.build()
    glora.activate(layer, name := next(iter(glora.adapters(layer))))
    glora.save(layer, folder / "adapter", name)
    save_file(case.plain().state_dict(), folder / "base.safetensors")
    adapter = folder / "adapter" / "adapter_model.safetensors"
    internals.merge_files(folder / "base.safetensors", adapter, folder / "out.safetensors")
    wanted, found = glora.merge(layer).state_dict(), load_file(folder / "out.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_what_merge_refuses_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_half_precision(tmp_path / "adapter", create_bias=True)
    save_file(half_precision_model().state_dict(), tmp_path / "base.safetensors")
    save_file(nn.Linear(6, 8).state_dict(), tmp_path / "other.safetensors")
    index = sharded(tmp_path / "base", half_precision_model())
    climbing = tmp_path / "climbing.safetensors.index.json"
    climbing.write_text(index.read_text().replace("model-0", "../model-0"))
    huge = load_file(tmp_path / "base.safetensors")
    huge["1.weight"] = torch.full_like(huge["1.weight"], torch.inf)
    save_file(huge, tmp_path / "huge.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "base.safetensors").read_bytes()[:-3])
    for base, out, message in (
        ("base.safetensors", "base.safetensors", "stays as it is"),
        ("other.safetensors", "out.safetensors", "does not have"),
        ("huge.safetensors", "out.safetensors", "must be finite"),
        ("cut.safetensors", "out.safetensors", "a complete safetensors file"),
        ("climbing.safetensors.index.json", "out.safetensors", "its own folder"),
        ("nowhere.safetensors", "out.safetensors", "no file"),
    ):
        assert main(["merge", str(tmp_path / base), str(tmp_path / "adapter"), str(tmp_path / out)]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out.safetensors").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("shards", [False, True])
def test_another_base_is_named_or_refused_before_anything_is_in_place(shards: bool, tmp_path: Path) -> None:
    saved_half_precision(tmp_path / "adapter", create_bias=True)
    other = half_precision_model()
    with torch.no_grad():
        other[0].bias.neg_()
        other[1].weight.neg_()
    save_file(other.state_dict(), tmp_path / "base.safetensors")
    base = sharded(tmp_path / "base", other) if shards else tmp_path / "base.safetensors"
    out = tmp_path / "out" / ("model.safetensors.index.json" if shards else "model.safetensors")
    arguments = ["merge", str(base), str(tmp_path / "adapter"), str(out)]
    assert main([*arguments, "--strict"]) == 1
    assert not out.parent.exists() or not list(out.parent.iterdir())
    with pytest.warns(UserWarning, match=r"in (0\.bias, 1\.weight|1\.weight, 0\.bias)\. "):
        assert main(arguments) == 0
    assert out.exists()


@pytest.mark.parametrize("paths", ["A", "E", "ABCDE"])
def test_the_base_is_compared_without_another_reading(paths: str, tmp_path: Path) -> None:
    forms: dict[str, Any] = {path: "vector" if path in paths else "none" for path in "ABCDE"}
    model = half_precision_model()
    glora.save(glora.apply(model, ["0"], glora.GLoRAConfig(**forms, init="random")), tmp_path / "adapter")
    save_file(half_precision_model().state_dict(), tmp_path / "base.safetensors")
    counts: list[int] = []
    for known in (True, False):
        if not known:
            copied_without_base(tmp_path / "adapter", tmp_path / "old")
        folder = tmp_path / ("adapter" if known else "old")
        with internals.tensors_read() as keys:
            internals.merge_files(
                tmp_path / "base.safetensors", folder / "adapter_model.safetensors", tmp_path / f"{known}.safetensors"
            )
        counts.append(len(keys))
    assert counts[0] == counts[1]
    assert (tmp_path / "True.safetensors").read_bytes() == (tmp_path / "False.safetensors").read_bytes()
