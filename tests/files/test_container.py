"""Safetensors files are replaced in one step, and what cannot be read again is not written."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import glora
from glora import interop
from tests.helpers import internals
from tests.helpers.calls import only
from tests.helpers.files import most_bytes_of_a_header, saved, small_model, stored_sum


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


def test_tensors_without_memory_are_refused_by_name_in_every_format(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 4))
    glora.apply(model, config=only(A="lora", B="lora", product="matmul"))
    with pytest.raises(ValueError, match="'0.A.left' is on the meta device"):
        glora.save(model, tmp_path / "glora")
    with pytest.raises(ValueError, match="'lycoris_0.a1.weight' is on the meta device"):
        interop.save_lycoris(model, tmp_path / "lycoris.safetensors")
    model = glora.apply(glora.remove(model), config=only(A="lora", B="lora"))
    with pytest.raises(ValueError, match="'base_model.model.0.glora_A.Xd' is on the meta device"):
        interop.save_peft(model, tmp_path / "peft")
    assert not list(tmp_path.iterdir())


DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@st.composite
def strided(draw: st.DrawFn) -> Tensor:
    """A tensor of any strides, those of sizes of one among them."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    wide = torch.randn([size + draw(st.integers(0, 2)) for size in shape], dtype=draw(st.sampled_from(DTYPES)))
    return wide[tuple(slice(size) for size in shape)].permute(draw(st.permutations(range(len(shape)))))


@given(strided())
def test_plain_tensors_have_strides_and_bytes_of_their_own(tensor: Tensor) -> None:
    plain = internals.plain_tensors({"": tensor})[""]
    assert torch.equal(plain, tensor)
    assert plain.stride() == torch.empty(tensor.shape).stride()
    kept = internals.bytes_of(plain)
    expected = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    del plain
    assert bytes(kept) == expected


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1)])
def test_heads_of_any_strides_are_saved(shape: tuple[int, int], tmp_path: Path) -> None:
    head = nn.Linear(*shape[::-1], bias=False)
    head.weight = nn.Parameter(torch.randn(*shape[::-1], 5)[..., 0].T)
    model = nn.Sequential(nn.Linear(2, shape[1]), head)
    base = nn.Sequential(nn.Linear(2, shape[1]), nn.Linear(*shape[::-1], bias=False))
    base.load_state_dict(model.state_dict())
    glora.save(glora.apply(model, ["0"], trainable=["1"], config=glora.GLoRAConfig.glora()), tmp_path)
    assert torch.equal(glora.load(base, tmp_path, strict=True)[1].weight, head.weight)


def test_without_numpy_a_save_names_the_extra_and_the_rest_works(tmp_path: Path) -> None:
    layer = glora.apply(nn.Linear(4, 3), config=glora.GLoRAConfig.glora(init="random"))
    glora.save(layer, tmp_path / "a")
    save_file(glora.base_state_dict(layer), tmp_path / "base.safetensors")
    torch.save([glora.base_state_dict(layer), layer.weight.detach()], tmp_path / "tensors.pt")
    script = """
import sys
sys.modules["numpy"] = None
import torch, glora
from glora.__main__ import main
folder = sys.argv[1]
base, W = torch.load(folder + "/tensors.pt")
layer = torch.nn.Linear(4, 3)
layer.load_state_dict(base)
print(torch.equal(glora.load(layer, folder + "/a", strict=True).weight, W))
print(main(["merge", folder + "/base.safetensors", folder + "/a", folder + "/out.safetensors"]))
try:
    glora.save(layer, folder + "/b")
except ImportError as error:
    print("'numpy'" in str(error), "glora[files]" in str(error))
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script, tmp_path], capture_output=True, text=True)
    assert run.stdout.split() == ["True", "0", "True", "True"], run.stderr


def test_a_save_removes_what_killed_saves_left_and_nothing_else(tmp_path: Path) -> None:
    digits = "0123456789abcdef" * 2
    stale = [f".{name}.{digits}" for name in ("adapter_model.safetensors", "README.md", "glora_config.json")]
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
    assert left == {*others, running, "adapter_model.safetensors", "README.md", "glora_config.json"}


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("count", range(1, 7))
def test_stopped_anywhere_the_old_adapter_or_the_new_one_is_there(tmp_path: Path, step: str, count: int) -> None:
    saved(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "Of the old one.")
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
    # All bytes are on the disk (three flushes) before the first file is replaced; the copy is never another adapter's.
    replaced = count > (3 if step == "fsync" else 1)
    assert stored_sum(tmp_path) == (new if replaced else old)
    names = {"new", "glora_config.json", "README.md", "adapter_model.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} <= names
    assert not card.exists() or card.read_text().endswith("Of the old one.") is not replaced
    glora.load(small_model(seed=1 if replaced else 0), tmp_path)  # with no warning
