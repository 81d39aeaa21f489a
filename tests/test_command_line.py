"""`python -m glora`: looking at and converting adapters without a model (merging: tests/files/test_checkpoint.py)."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import glora
from glora.__main__ import main
from tests.helpers.calls import only, quiet
from tests.helpers.files import damages, is_reordered, saved_half_precision

PROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()


def test_inspect_prints_the_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_half_precision(tmp_path / "adapter", A="vector", create_bias=True)
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    printed = capsys.readouterr().out
    assert "2 layers" in printed
    assert "A=vector B=lora C=vector D=vector E=vector" in printed
    assert "8x6" in printed
    assert "head" in printed


def test_convert_there_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    forms: dict[str, Any] = {"C": "none", "D": "none", "E": "none"}
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    for there, product in (("peft", "hadamard"), ("lycoris", "matmul")):
        glora.apply(model, config=glora.GLoRAConfig.glora(init="random", rank=2, alpha=3, product=product, **forms))
        glora.save(model, tmp_path / "a")
        out = tmp_path / (f"{there}.safetensors" if there == "lycoris" else there)
        assert main(["convert", str(tmp_path / "a"), str(out), "--to", there]) == 0
        back = ["convert", str(out), str(tmp_path / "b"), "--to", "glora", "--base", str(tmp_path / "base.safetensors")]
        assert main(back) == 0
        again = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
        again.load_state_dict(glora.base_state_dict(model))
        glora.load(again, tmp_path / "b", strict=True)
        torch.testing.assert_close(again[1].weight, model[1].weight)
        glora.remove(model)


def test_rs_lora_is_an_option_of_every_command_that_reads_or_writes_lycoris(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8))
    base, file, out = (str(tmp_path / f"{name}.safetensors") for name in ("base", "lycoris", "out"))
    save_file(model.state_dict(), base)
    config = replace(only(A="lora", B="lora"), product="matmul", init="random", rank=4, alpha=3)
    glora.save(glora.apply(model, config=config), tmp_path / "a")
    assert main(["convert", str(tmp_path / "a"), file, "--to", "lycoris", "--rs-lora"]) == 0
    assert load_file(file)["lycoris_0.alpha"].item() == pytest.approx(3 / 4 * 2)  # alpha / sqrt(rank) is 3 / 4
    assert main(["merge", base, file, out, "--rs-lora"]) == 0
    torch.testing.assert_close(load_file(out)["0.weight"], model[0].weight)


def test_the_command_exists() -> None:
    run = subprocess.run([sys.executable, "-m", "glora", "--help"], capture_output=True, text=True, check=True)
    assert "merge" in run.stdout
    assert f'[project.scripts]\nglora = "{main.__module__}:{main.__name__}"\n' in PROJECT


@pytest.mark.parametrize("name", ["nowhere", "nowhere.safetensors", "nowhere.pt"])
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_a_path_that_is_not_there_is_named(
    name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = [str(tmp_path / "out"), "--to", "peft"] if command == "convert" else []
    assert main([command, str(tmp_path / name), *rest]) == 1
    assert f"there is none at {str(tmp_path / name)!r}" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([command, str(tmp_path / "empty"), *rest]) == 1
    assert "adapter_model.safetensors; there is none at" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "extra"), [("tqdm", "cli"), ("safetensors", "files")])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    module: str, extra: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_half_precision(tmp_path / "a", create_bias=True)
    with mock.patch.dict(sys.modules, {module: None, f"{module}.torch": None}):
        assert main(["merge", "base.safetensors", str(tmp_path / "a"), "out.safetensors"]) == 1
    error = capsys.readouterr().err
    assert f"'{module}'" in error
    assert f"glora[{extra}]" in error
    assert re.search(rf'^{extra} = \[.*"{module}>=', PROJECT, re.MULTILINE)


@given(st.randoms(use_true_random=False), st.sampled_from(["glora", "peft", "lycoris", "base"]))
def test_a_damaged_file_is_an_error_and_no_traceback(tmp_path_factory: Any, rng: random.Random, which: str) -> None:
    folder = tmp_path_factory.mktemp("damage")
    torch.manual_seed(0)  # the files' lengths go by the base's fingerprints
    forms: dict[str, Any] = {"C": "none", "D": "none", "E": "none"}
    model = nn.Sequential(nn.Linear(3, 2))
    save_file(model.state_dict(), folder / "base.safetensors")
    product = "matmul" if which == "lycoris" else "hadamard"
    glora.apply(model, config=glora.GLoRAConfig.glora(init="random", rank=2, product=product, **forms))
    glora.save(model, folder / "base")
    adapter = folder / {"lycoris": "lycoris.safetensors", "base": "base"}.get(which, which)
    if which != "base":
        assert main(["convert", str(folder / "base"), str(adapter), "--to", which]) == 0
    read_by_nobody = ("glora_config.json", "README.md")
    files = [file for file in (adapter, *adapter.glob("*.*")) if file.is_file() and file.name not in read_by_nobody]
    damaged = folder / "base.safetensors" if which == "base" else rng.choice(sorted(files))
    good = damaged.read_bytes()
    bad = damages(good, good[::-1], b"{", rng)
    damaged.write_bytes(bad)
    base = ["--base", str(folder / "base.safetensors")]
    for arguments in (
        ["inspect", str(adapter), *base],
        ["convert", str(adapter), str(folder / "converted"), "--to", "glora", *base],
        ["merge", base[1], str(adapter), str(folder / "out.safetensors")],
    ):
        with quiet():  # of a damaged base: the adapter was trained beside another
            code = main(arguments)  # an error is returned, not raised
        assert code in (0, 1)
        if which == "glora" and not is_reordered(bad, good):
            assert code == 1
    if len(bad) < len(good) and damaged.suffix == ".safetensors":
        assert not (folder / "out.safetensors").exists()


def test_the_version() -> None:
    run = subprocess.run([sys.executable, "-m", "glora", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"glora {glora.__version__}\n"


def test_convert_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    glora.save(glora.apply(model, ["0"], glora.GLoRAConfig.glora(), trainable=["1"]), tmp_path / "a")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "glora"]) == 0
    assert capsys.readouterr().out == f"Wrote 1 layers and 1 heads to {tmp_path / 'b'}, as glora has them.\n"


@pytest.mark.parametrize("command", ["inspect", "convert", "merge"])
def test_ctrl_c_ends_a_command_without_a_traceback(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = {"convert": ["out", "--to", "peft"], "merge": ["out", "out.safetensors"]}.get(command, [])
    with mock.patch("glora.__main__._read", side_effect=KeyboardInterrupt):
        assert main([command, str(tmp_path / "a"), *rest]) == 130
    assert capsys.readouterr().err == "glora: interrupted; no file was changed\n"


def files_of_all_kinds(folder: Path) -> Path:
    """A base, its adapter, and what somebody may take for one of them."""
    base = nn.Sequential(nn.Linear(3, 2))
    (folder / "model").mkdir(parents=True)
    save_file(base.state_dict(), folder / "base.safetensors")
    save_file(base.state_dict(), folder / "model" / "model.safetensors")
    (folder / "empty").mkdir()
    (folder / "train.py").write_text("import glora")
    glora.save(glora.apply(base, config=glora.GLoRAConfig.glora()), folder / "adapter")
    return folder


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base.safetensors", "looks like a model's checkpoint"),
        ("model/model.safetensors", "looks like a model's checkpoint"),
        ("train.py", "An adapter is a folder, or a file of tensors"),
        ("adapter/glora_config.json", "adapter' may be one"),
        ("model", "there is none at"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "convert", "merge"])
def test_what_is_no_adapter_is_named(
    name: str, said: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = files_of_all_kinds(tmp_path)
    given = {"merge": [str(folder / "base.safetensors"), str(folder / name), str(folder / "out.safetensors")]}
    rest = ["--base", str(folder / "base.safetensors")] if command == "inspect" else []
    rest += [str(folder / "out"), "--to", "peft"] if command == "convert" else []
    assert main([command, *given.get(command, [str(folder / name), *rest])]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "LyCORIS has underscores" not in error


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("adapter", "base.safetensors", "out.safetensors"), "BASE ADAPTER OUT, in this order; found an adapter"),
        (("adapter/adapter_model.safetensors", "base.safetensors", "out.safetensors"), "found an adapter"),
        (("empty", "adapter", "out.safetensors"), "A checkpoint's folder has one .safetensors file"),
        (("base.safetensors", "adapter", "out.pt"), "A merged checkpoint is a .safetensors file"),
        (("base.safetensors", "adapter", "out"), "A merged checkpoint is a .safetensors file"),
    ],
)
def test_merge_names_arguments_that_are_exchanged_and_an_out_that_it_does_not_write(
    given: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = files_of_all_kinds(tmp_path)
    before = sorted(folder.rglob("*"))
    assert main(["merge", *(str(folder / name) for name in given)]) == 1
    assert said in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_inspect_compares_the_update_with_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    glora.save(glora.apply(model, ["0"], glora.GLoRAConfig.lora(), trainable=["1"]), tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a"), "--base", str(tmp_path / "base.safetensors")]) == 0
    title, header, row, head = capsys.readouterr().out.splitlines()
    assert title.endswith("W' - W0 of norm 0, 0.00% of W0's")
    assert header.endswith("norms of paths  of W' - W0  of W0  of b' - b0")
    assert row.split()[-4:] == ["B=0", "0", "0.00%", "0"]
    assert head.split()[-4:] == ["-"] * 4
