"""Adapter files: what is saved comes back; damaged and forged files are found before anything has changed."""

from __future__ import annotations

import copy
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from tests.helpers import internals
from tests.helpers.files import damages, is_reordered, saved, small_model, stored_sum
from tests.helpers.marks import examples
from tests.helpers.state import clones, same
from tests.helpers.strategies import Case, cases


@examples(60)
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
    names = ["README.md", "adapter_model.safetensors", "glora_config.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names


def test_a_description_of_many_layers_is_read_again(tmp_path: Path) -> None:
    # As long as one of 69,120 layers (the experts of a large model), which takes longer to make.
    model = nn.ModuleDict({f"{number}{'m' * 2**20}": nn.Linear(1, 1, bias=False) for number in range(20)})
    plain = copy.deepcopy(model)
    glora.save(glora.apply(model, config=glora.GLoRAConfig.lora(rank=1, init="random")), tmp_path)
    assert (tmp_path / "glora_config.json").stat().st_size > 2**24
    assert len(glora.state_dict(glora.load(plain, tmp_path))) == 40


def test_a_thousand_damages_are_all_found_and_change_nothing(tmp_path: Path) -> None:
    saved(tmp_path)
    saved(tmp_path / "other", seed=1)
    file = tmp_path / "adapter_model.safetensors"
    good, other = file.read_bytes(), (tmp_path / "other" / file.name).read_bytes()
    text = (tmp_path / "glora_config.json").read_bytes()
    target, rng, found = small_model(), random.Random(0), 0
    before = clones(target.state_dict())
    while found < 1000:
        damaged = damages(good, other, text, rng)
        if is_reordered(damaged, good) or is_reordered(damaged, other):
            continue
        file.write_bytes(damaged)
        with pytest.raises(glora.AdapterFileError, match=file.name):
            glora.load(target, tmp_path)
        found += 1
    assert type(target[0]) is nn.Linear
    assert same(target.state_dict(), before)


def rewritten(directory: Path, **changes: Any) -> None:
    """The file with other contents, and a right sum over them: not damaged, but made."""
    from safetensors.torch import load, save

    file = directory / "adapter_model.safetensors"
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    said, tensors = json.loads(header["__metadata__"]["glora"]), load(data)
    tensors |= changes.pop("tensors", {})
    text = changes.pop("text", None) or json.dumps(changes.pop("change")(said) or said)
    file.write_bytes(save(tensors, {"format": "pt", "glora": text, "sha256": internals.sum_of_contents(text, tensors)}))


CHANGES: dict[str, Any] = {
    "a newer format": {"change": lambda said: said.update(format_version=2)},
    "no layers": {"change": lambda said: said.pop("layers") and None},
    "a path that climbs out": {"change": lambda said: said["layers"].update({"../../etc": said["layers"].pop("0")})},
    "a rank that would fill memory": {"change": lambda said: said["layers"]["0"].update(rank=10**12)},
    "another shape": {"change": lambda said: said["layers"]["0"].update(out_features=7)},
    "another bias": {"change": lambda said: said["layers"]["0"].update(bias=False)},
    "an unknown field": {"change": lambda said: said["layers"]["0"].update(unknown=1)},
    "a form of none": {"change": lambda said: said["layers"]["0"]["forms"].update(A="diagonal")},
    "an unknown path": {"change": lambda said: said["layers"]["0"]["forms"].update(Z="vector")},
    "a JSON bomb": {"text": "[" * 100_000},
    "a list": {"text": "[]"},
    "a tensor more": {"change": dict, "tensors": {"0.Z.left": torch.zeros(1)}},
    "integers": {"change": dict, "tensors": {"0.D.value": torch.zeros(4, dtype=torch.int32)}},
    "another head": {"change": lambda said: said["heads"].update({"1": ["weight"]})},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_made_file_is_refused_by_what_it_says(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    rewritten(tmp_path, **dict(CHANGES[name]))
    target = small_model()
    before = clones(target.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the readers' copy differs as well
        with pytest.raises(glora.AdapterFileError, match="adapter_model"):
            glora.load(target, tmp_path)
    assert same(target.state_dict(), before)
    assert type(target[0]) is nn.Linear


@pytest.mark.parametrize("call", [glora.save, glora.load])
def test_exchanged_arguments_are_named(call: Any, tmp_path: Path) -> None:
    model = glora.apply(nn.Linear(2, 2), config=glora.GLoRAConfig.glora())
    for given_ in ((tmp_path / "a", model), (str(tmp_path / "a"), model), (model, None), (model, model), (None, "a")):
        with pytest.raises(ValueError, match=rf"glora\.{call.__name__} takes a model and then a folder; found a"):
            call(*given_)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.bin", "a.json", "there"])
def test_the_name_of_a_file_is_no_folder(name: str, tmp_path: Path) -> None:
    model = glora.apply(nn.Linear(2, 2), config=glora.GLoRAConfig.glora())
    (tmp_path / "there").touch()
    with pytest.raises(ValueError, match="glora.save writes a folder"):
        glora.save(model, tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["there"]
    for folder in ("step.100", "v1.2", ".hidden"):
        glora.save(model, tmp_path / folder)
    (tmp_path / "was.bin").mkdir()
    glora.save(model, tmp_path / "was.bin")


@pytest.mark.parametrize(
    ("name", "hub"), [("user/my-adapter", True), ("/nowhere/a", False), ("a", False), ("a/b/c", False)]
)
def test_what_looks_like_a_repository_of_a_hub_is_said_to_be_none(
    name: str, hub: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is none at") as caught:
        glora.load(nn.Linear(2, 2), name)
    assert ("snapshot_download" in str(caught.value)) is hub


@given(st.text(max_size=3), st.sampled_from([torch.float32, torch.int32]), st.permutations([1, 2, 6]), st.data())
def test_the_sum_tells_equal_bytes_apart_by_key_dtype_and_shape(
    key: str, dtype: torch.dtype, shape: list[int], data: st.DataObject
) -> None:
    tensor = torch.arange(12, dtype=torch.int32).view(dtype).reshape(shape)
    other_key = data.draw(st.sampled_from([key, key + "."]))
    other = data.draw(st.sampled_from([tensor, tensor.flatten(), tensor[None], tensor.reshape(*shape[::-1])]))
    other = other.view(data.draw(st.sampled_from([torch.float32, torch.int32])))
    same = (other_key, other.dtype, other.shape) == (key, tensor.dtype, tensor.shape)
    sums = internals.sum_of_contents("", {key: tensor}), internals.sum_of_contents("", {other_key: other})
    assert (sums[0] == sums[1]) is same
