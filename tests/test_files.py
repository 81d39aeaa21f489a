"""Adapter files: what is saved comes back, and what is damaged is found before anything has changed."""

from __future__ import annotations

import json
import os
import random
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import glora
from tests.strategies import Case, cases

CONFIG = glora.GLoRAConfig(init="random", rank=2, create_bias=True)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False))


def saved(directory: Path, seed: int = 0) -> nn.Module:
    made = glora.apply(model(seed), ["0", "2"], CONFIG, trainable=["1"])
    with torch.no_grad():
        for parameter in glora.parameters(made):
            parameter.add_(0.1)
    glora.save(made, directory)
    return made


def contents(directory: Path) -> str:
    """The sum over all that the file says; its bytes may differ, safetensors orders metadata at random."""
    from safetensors import safe_open

    with safe_open(directory / "adapter_model.safetensors", framework="pt") as opened:
        return opened.metadata()["sha256"]


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
    before = contents(directory)
    glora.save(other, directory)
    assert contents(directory) == before


def test_heads_and_created_biases_travel_along(tmp_path: Path) -> None:
    made = saved(tmp_path)
    other = glora.load(model(), tmp_path)
    x = torch.randn(6, 5)
    assert torch.equal(made.eval()(x), other.eval()(x))
    assert list(glora.state_dict(made)) == list(glora.state_dict(other))
    with glora.disabled(other):
        assert torch.equal(other(x), model().eval()(x))


def test_on_a_meta_model_the_tensors_wait_on_the_cpu(tmp_path: Path) -> None:
    made = saved(tmp_path)
    with torch.device("meta"):
        bare = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False))
    glora.load(bare, tmp_path)
    bare.load_state_dict(model().state_dict(), assign=True)
    x = torch.randn(6, 5)
    assert torch.equal(made.eval()(x), bare.eval()(x))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def damages(good: bytes, other: bytes, text: bytes, rng: random.Random) -> bytes:
    """One of many ways in which a file may be damaged."""
    kind = rng.randrange(7)
    at = rng.randrange(len(good))
    header = int.from_bytes(good[:8], "little")
    if kind == 0:
        return good[:at]
    if kind == 1:
        return good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :]
    if kind == 2:
        at = rng.randrange(8 + header)
        return good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :]
    if kind == 3:  # another's body under this one's header, and the reverse
        return good[: 8 + header] + other[8 + header :] if rng.random() < 0.5 else other[:at] + good[at:]
    if kind == 4:
        return rng.choice([text, b"", rng.randbytes(at), good + rng.randbytes(1 + at)])
    if kind == 5:
        bomb = b"[" * (1000 + at) if rng.random() < 0.5 else b'{"a":' * (1000 + at)
        return rng.choice([len(bomb).to_bytes(8, "little") + bomb, (2**62 + at).to_bytes(8, "little") + good[8:]])
    end = min(len(good), at + 1 + rng.randrange(64))
    return good[:at] + rng.randbytes(end - at) + good[end:]


def test_a_thousand_damages_are_all_found_and_change_nothing(tmp_path: Path) -> None:
    saved(tmp_path)
    saved(tmp_path / "other", seed=1)
    file = tmp_path / "adapter_model.safetensors"
    good, other = file.read_bytes(), (tmp_path / "other" / file.name).read_bytes()
    text = (tmp_path / "adapter_config.json").read_bytes()
    target, rng, found = model(), random.Random(0), 0
    before = state(target)
    while found < 1000:
        damaged = damages(good, other, text, rng)
        if damaged in (good, other):
            continue
        file.write_bytes(damaged)
        with pytest.raises(glora.AdapterFileError, match=file.name):
            glora.load(target, tmp_path)
        found += 1
    assert type(target[0]) is nn.Linear
    assert all(torch.equal(a, b) for a, b in zip(state(target).values(), before.values(), strict=True))


def rewritten(directory: Path, **changes: Any) -> None:
    """The file with other contents, and a right sum over them: not damaged, but made."""
    from safetensors.torch import load, save

    from glora.files import digest

    file = directory / "adapter_model.safetensors"
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    said, tensors = json.loads(header["__metadata__"]["glora"]), load(data)
    tensors |= changes.pop("tensors", {})
    text = changes.pop("text", None) or json.dumps(changes.pop("change")(said) or said)
    file.write_bytes(save(tensors, {"format": "pt", "glora": text, "sha256": digest(text, tensors)}))


CHANGES: dict[str, Any] = {
    "a newer format": {"change": lambda said: said.update(format_version=2)},
    "no layers": {"change": lambda said: said.pop("layers") and None},
    "a path that climbs out": {"change": lambda said: said["layers"].update({"../../etc": said["layers"].pop("0")})},
    "a rank that would fill memory": {"change": lambda said: said["layers"]["0"].update(rank=10**12)},
    "another shape": {"change": lambda said: said["layers"]["0"].update(out_features=7)},
    "another bias": {"change": lambda said: said["layers"]["0"].update(bias=False)},
    "an unknown field": {"change": lambda said: said["layers"]["0"].update(unknown=1)},
    "a form of none": {"change": lambda said: said["layers"]["0"]["forms"].update(A="diagonal")},
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
    target = model()
    before = state(target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the readers' copy differs as well
        with pytest.raises(glora.AdapterFileError, match="adapter_model"):
            glora.load(target, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(state(target).values(), before.values(), strict=True))
    assert type(target[0]) is nn.Linear


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    for other in (nn.Linear(5, 4), nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))):
        with pytest.raises(glora.AdapterFileError, match="nothing was changed"):
            glora.load(other, tmp_path)
        assert not glora.adapters(other)
    twice = glora.load(model(), tmp_path)
    with pytest.raises(ValueError, match="new to the model"):
        glora.load(twice, tmp_path)
    with pytest.raises(FileNotFoundError):
        glora.load(model(), tmp_path / "nowhere")


def test_the_readers_copy_warns_where_it_differs(tmp_path: Path) -> None:
    saved(tmp_path)
    copy = tmp_path / "adapter_config.json"
    copy.write_text(copy.read_text().replace('"rank": 2', '"rank": 3', 1))
    with pytest.warns(UserWarning, match="which is what counts"):
        glora.load(model(), tmp_path)
    copy.write_text("{" * 100_000)
    with pytest.raises(glora.AdapterFileError, match="adapter_config"):
        glora.load(model(), tmp_path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("count", [1, 2])
def test_stopped_anywhere_the_old_adapter_or_the_new_one_is_there(tmp_path: Path, step: str, count: int) -> None:
    saved(tmp_path)
    old = contents(tmp_path)
    real, calls = getattr(os, step), []

    def stop(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == count:
            raise KeyboardInterrupt
        return real(*args)

    with mock.patch.object(os, step, stop), pytest.raises(KeyboardInterrupt):
        saved(tmp_path, seed=1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    saved(tmp_path / "new", seed=1)
    assert contents(tmp_path) == (old if count == 1 else contents(tmp_path / "new"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        glora.load(model(), tmp_path)
