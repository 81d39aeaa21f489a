"""Damaged and forged adapter files are found before anything has changed."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import glora
from tests.helpers import internals
from tests.helpers.files import damages, is_reordered, saved, small_model
from tests.helpers.state import clones, same


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
