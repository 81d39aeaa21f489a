"""`glora combine` and `glora extract`: the same on files, without a model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import glora
from glora.__main__ import main
from tests.helpers.calls import RANDOM, attach, only
from tests.helpers.models import TOKENS, build


def saved(model: nn.Module, folder: Path, name: str, **arguments: object) -> Path:
    glora.save(attach(copy.deepcopy(model), RANDOM, **arguments), folder / name)
    return folder / name


@pytest.mark.parametrize("rank", [[], ["--rank", "2"]])
def test_combined_files_are_what_acts_together(
    rank: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build()
    a, b = saved(model, tmp_path, "a", targets=["first"]), saved(model, tmp_path, "b", targets=["first", "third"])
    assert main(["combine", str(a), str(b), str(tmp_path / "ab"), "--weights", "0.7,-2", *rank]) == 0
    assert ("relative error" in capsys.readouterr().out) is bool(rank)
    together = glora.activate(glora.load(glora.load(copy.deepcopy(model), a, "a"), b, "b"), {"a": 0.7, "b": -2.0})
    glora.load(model, tmp_path / "ab", strict=True)
    if not rank:
        torch.testing.assert_close(model(TOKENS), together(TOKENS))
    assert glora.state_dict(model)["first.B.left"].shape[1] == (2 if rank else 4)


def test_files_of_other_bases_and_heads_and_wrong_weights_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build()
    a, b = saved(model, tmp_path, "a", targets=["first"]), saved(build(), tmp_path, "b", targets=["first"])
    head = saved(model, tmp_path, "head", targets=["first"], trainable=["head"])
    for arguments, match in (
        ([a, b, "out", "--weights", "1,1"], "beside tensors that differ in first.bias, first.weight"),
        ([a, head, "out", "--weights", "1,1"], "head.bias, head.weight differ"),
        ([a, a, "out", "--weights", "1"], "found 2 adapters and the weights '1'"),
        ([a, "out", "--weights", "1"], "found 1 adapters"),
        ([a, a, "out", "--weights", "1,nan"], "finite number"),
        ([a, a, "out", "--weights", "x,1"], "weights 'x,1'"),
        ([a, a, "out", "--weights", "0,0"], "whose weight is not 0"),
        ([a, a, "out", "--weights", "1,1", "--rank", "0"], "rank must be"),
    ):
        assert main(["combine", *(str(tmp_path / x) if x == "out" else str(x) for x in arguments)]) == 1
        assert match in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_extracted_lora_is_the_tuned_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build()
    tuned = glora.merge(
        attach(copy.deepcopy(model), only(B="lora", rank=1, init="random"), targets=["first", "second"])
    )
    with torch.no_grad():
        tuned.embed.weight[0] += 1e-3
        tuned.norm.bias.add_(0.0)
    files = [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    for file, each in zip(files, (model, tuned), strict=True):
        save_file(each.state_dict(), file)
    assert main(["extract", *files, str(tmp_path / "out"), "--rank", "2"]) == 0
    printed = capsys.readouterr().out
    assert "2 layers: relative error 0.00%" in printed
    assert "1 other tensors differ, which the adapter does not hold: embed.weight" in printed
    glora.load(model, tmp_path / "out", strict=True)
    for name in ("first", "second"):
        torch.testing.assert_close(getattr(model, name).weight, getattr(tuned, name).weight, rtol=1e-4, atol=1e-5)
    assert main(["extract", *files, str(tmp_path / "none"), "--rank", "2", "--targets", "head"]) == 1
    assert "differ from the base in a matrix that 'head' matches" in capsys.readouterr().err


def test_files_whose_running_statistics_differ_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build()
    a = saved(model, tmp_path, "a", targets=["first"])
    other = attach(copy.deepcopy(model), RANDOM, targets=["first"])
    other.train()(TOKENS)
    glora.save(other, tmp_path / "b")
    assert main(["combine", str(a), str(tmp_path / "b"), str(tmp_path / "ab"), "--weights", "1,1"]) == 1
    assert "norm.running_mean" in capsys.readouterr().err
    assert not (tmp_path / "ab").exists()
