"""A checkpoint's file merged tensor by tensor, without a model: the bits of `glora.merge`."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import glora
from glora import GLoRAConfig
from glora.__main__ import main
from glora.files.checkpoint import merge_checkpoint
from glora.model.attach import attach_spec
from glora.spec import AdapterSpec, LayerSpec
from tests.helpers import internals
from tests.helpers.calls import quiet
from tests.helpers.files import copied_without_base, half_precision_model, saved_half_precision, sharded
from tests.helpers.kinds import experts
from tests.helpers.marks import examples
from tests.helpers.strategies import Case, cases


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("shape", ["one file", "sharded", "sharded into one"])
def test_merge_gives_the_bits_of_glora_merge(shape: str, folder: bool, tmp_path: Path) -> None:
    """The base by its file or index, or by the folder that it is in."""
    model = saved_half_precision(tmp_path / "adapter", create_bias=True)
    save_file(half_precision_model().state_dict(), tmp_path / "base.safetensors")
    base = tmp_path / "base.safetensors" if shape == "one file" else sharded(tmp_path / "base", half_precision_model())
    before = {file: file.read_bytes() for file in base.parent.glob("*.safetensors")}
    out = tmp_path / "out" / ("model.safetensors.index.json" if shape == "sharded" else "model.safetensors")
    given = base.parent if folder else base
    assert main(["merge", str(given), str(tmp_path / "adapter"), str(out)]) == 0
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


@examples(60)
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


class WithHead(nn.Module):
    """A model that holds its backbone as one attribute."""

    def __init__(self, backbone: nn.Module, front: str, head: int) -> None:
        super().__init__()
        self.add_module(front, backbone)
        self.classifier = nn.Linear(head, 2)


def backbone(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Module()
    model.layers, model.norm = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6, bias=False)), nn.LayerNorm(6)
    return model


@given(
    st.sampled_from(["bert", "transformer", "layers", "m"]),
    st.booleans(),
    st.booleans(),
    st.lists(st.sampled_from(["layers.0", "layers.1"]), min_size=1, unique=True),
    st.booleans(),
)
def test_a_backbone_and_the_model_around_it_take_each_others_adapters(
    tmp_path_factory: Any, front: str, whole: bool, other: bool, targets: list[str], train_norm: bool
) -> None:
    folder, inner = tmp_path_factory.mktemp("merge"), backbone(0)
    model = WithHead(inner, front, 6) if whole else inner
    base = WithHead(copy.deepcopy(inner), front, 6) if not whole else copy.deepcopy(inner)
    if other:  # another base is reported under its own keys
        base.get_submodule("layers.0" if whole else f"{front}.layers.0").weight.data.mul_(2)
    save_file(base.state_dict(), folder / "base.safetensors")
    glora.apply(
        model, targets, GLoRAConfig.glora(init="random", rank=2, create_bias=True), trainable=["norm"] * train_norm
    )
    glora.save(model, folder / "a")
    command = ["merge", str(folder / "base.safetensors"), str(folder / "a"), str(folder / "out.safetensors")]
    differs = other and "layers.0" in targets
    named = "0.weight" if differs else "classifier.weight"  # which the backbone's checkpoint does not have
    with pytest.warns(UserWarning, match=named) if differs or whole else contextlib.nullcontext():
        assert main(command) == 0
    found = load_file(folder / "out.safetensors")
    wanted = {("" if whole else f"{front}.") + key: tensor for key, tensor in glora.merge(inner).state_dict().items()}
    assert found.keys() == base.state_dict().keys() | wanted.keys()
    for key in wanted:
        if not (other and "layers.0." in key):  # b' has W0 C
            assert torch.equal(found[key], wanted[key]), key


def test_what_is_not_in_the_backbone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inner = backbone(0)
    model = WithHead(inner, "bert", 6)
    save_file(inner.state_dict(), tmp_path / "base.safetensors")
    two = {f"{front}.{key}": tensor.clone() for front in "ab" for key, tensor in inner.state_dict().items()}
    save_file(two, tmp_path / "two.safetensors")
    glora.save(glora.apply(model, ["0"], trainable=["classifier"], config=glora.GLoRAConfig.glora()), tmp_path / "head")
    glora.save(glora.apply(backbone(0), ["0"], config=glora.GLoRAConfig.glora()), tmp_path / "inner")
    glora.save(
        glora.apply(nn.Sequential(nn.Sequential(nn.Linear(6, 5))), ["0.0"], config=glora.GLoRAConfig.glora()),
        tmp_path / "elsewhere",
    )
    for base, adapter in (("base", "head"), ("two", "inner"), ("base", "elsewhere")):
        files = [str(tmp_path / name) for name in (f"{base}.safetensors", adapter, "out.safetensors")]
        assert main(["merge", *files]) == 1
        said = capsys.readouterr().err
        assert "which the base does not have" in said
        assert "glora.merged(model)" in said
        assert "model.save_pretrained" in said
        assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("name", ["model.layers.0.mlp", "model.layers.0.block_sparse_moe"])
def test_experts_that_are_apart_in_the_checkpoint_are_refused_with_the_reason(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Module()
    model.experts = experts(False, False)()[0]
    for part in reversed(["model", "layers", "0", "mlp"]):
        outer = nn.Module()
        outer.add_module(part, model)
        model = outer
    glora.save(glora.apply(model, ["gate_up_proj"], GLoRAConfig.lora()), tmp_path / "a")
    apart = {f"{name}.experts.{e}.gate_proj.weight": torch.zeros(2, 2) for e in range(3)}
    save_file(apart, tmp_path / "base.safetensors")
    command = ["merge", str(tmp_path / "base.safetensors"), str(tmp_path / "a"), str(tmp_path / "out.safetensors")]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "each expert's matrices apart" in said
    assert "glora.merged(model)" in said
    assert "save_pretrained" in said


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
    glora.save(glora.apply(model, ["0"], glora.GLoRAConfig.glora(**forms, init="random")), tmp_path / "adapter")
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


@given(st.sampled_from(["ABCDE", "AD", "CD", "DE", "D", "BE"]), st.booleans())
def test_where_a_source_does_not_say_whether_there_is_a_bias_a_scale_of_none_is_left_out(
    tmp_path_factory: Any, paths: str, bias: bool
) -> None:
    folder, model = tmp_path_factory.mktemp("merge"), nn.Sequential(nn.Linear(4, 3, bias=bias))
    forms: Any = {path: "vector" if path in paths else "none" for path in "ABCDE"}
    with quiet():
        spec = LayerSpec(GLoRAConfig.glora(**forms, create_bias=True), 3, 4)
    tensors = {f"0.{key}": torch.randn(cast("Any", tensor.shape)) for key, tensor in spec.tensors().items()}
    adapter = AdapterSpec({"0": spec}, {}, tensors)
    save_file(model.state_dict(), folder / "base.safetensors")
    if paths == "D" and not bias:
        return  # nothing is left
    merge_checkpoint(folder / "base.safetensors", adapter, "it", folder / "out.safetensors")
    wanted = glora.merge(attach_spec(model, adapter, "it")).state_dict()
    found = load_file(folder / "out.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
