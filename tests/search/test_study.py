"""A study goes on: interrupted, killed, in any storage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages import InMemoryStorage
from torch import nn

import glora
from glora.search import evolve
from tests.helpers.marks import long
from tests.helpers.planted import BUDGET, X, build, history, planted, search


@pytest.mark.parametrize("file", ["study.db", long("study.journal")])
def test_interrupted_and_resumed_it_is_the_same_study(file: str, tmp_path: Path) -> None:
    unbroken = search(budget=BUDGET, trials=70)
    for stop in (7, 55):  # in the first generation, and in the second
        model, calls = build(), 0
        evaluate = planted(model)

        def interrupted(net: nn.Module, stop: int = stop, evaluate: Any = evaluate) -> float:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            return evaluate(net)

        with pytest.raises(KeyboardInterrupt):
            search(model, interrupted, budget=BUDGET, trials=70, storage=tmp_path / f"{stop}{file}")
        resumed = search(budget=BUDGET, trials=70, storage=tmp_path / f"{stop}{file}")
        assert history(resumed) == history(unbroken)


SCRIPT = """
import os, signal, sys, torch
sys.path[:0] = [sys.argv[1]]
from tests.helpers.planted import BUDGET, build, planted, search
torch.set_num_threads(1)
model, calls = build(), 0
evaluate = planted(model)
def counted(net):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(net)
search(model, counted, budget=BUDGET, trials=60, storage=sys.argv[2])
"""


def process(storage: Path, kill_at: int) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, root, str(storage), str(kill_at)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )


@pytest.mark.long
@pytest.mark.parametrize("file", ["study.db", "study.journal"])
def test_killed_and_resumed_it_is_the_same_study(file: str, tmp_path: Path) -> None:
    first = process(tmp_path / file, kill_at=53)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert history(search(budget=BUDGET, trials=60, storage=tmp_path / file)) == history(
        search(budget=BUDGET, trials=60)
    )


def test_other_arguments_are_another_study_in_the_same_storage(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    short = search(budget=BUDGET, trials=5, storage=file)
    assert len(search(budget=BUDGET, trials=8, storage=file).trials) == 8
    assert history(search(budget=BUDGET, trials=5, storage=file))[:5] == history(short)
    assert len(search(budget=BUDGET, trials=4, storage=file, seed=1).trials) == 4
    assert len(search(budget=BUDGET - 1, trials=4, storage=f"sqlite:///{file}").trials) == 4


def test_interrupted_in_memory_it_goes_on_too() -> None:
    storage, model, calls = InMemoryStorage(), build(), 0

    def interrupted(net: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return planted_score(net)

    planted_score = planted(model)
    with pytest.raises(KeyboardInterrupt):
        search(model, interrupted, budget=BUDGET, trials=6, storage=storage)
    assert history(search(budget=BUDGET, trials=6, storage=storage)) == history(search(budget=BUDGET, trials=6))


@pytest.mark.parametrize("storage", ["study.db", "study.journal", None])
def test_scores_of_another_task_are_refused(storage: str | None, tmp_path: Path) -> None:
    kept = InMemoryStorage() if storage is None else tmp_path / storage
    first = search(budget=BUDGET, trials=9, storage=kept)
    model, calls = build().eval(), 0

    def another(net: nn.Module) -> float:
        nonlocal calls
        calls += 1
        return 1.0 + float(net(X).sum()) ** 2

    for trials in (9, 20):  # nothing is left to evaluate, and something is
        before = model(X)
        with pytest.raises(RuntimeError, match="study of its own task alone.*Take another storage="):
            search(model, another, budget=BUDGET, trials=trials, storage=kept)
        assert torch.equal(model(X), before)
    assert calls == 2
    assert history(search(budget=BUDGET, trials=12, storage=kept))[:9] == history(first)


@given(noise=st.floats(-5e-3, 5e-3), scale=st.sampled_from([1e-3, 1.0, 1e4]))
def test_an_accelerators_noise_is_no_other_task(noise: float, scale: float) -> None:
    storage, model = InMemoryStorage(), build()
    score = planted(model)
    evolve(model, lambda net: scale * score(net), budget=BUDGET, trials=4, storage=storage)
    result = evolve(model, lambda net: scale * score(net) * (1 + noise), budget=BUDGET, trials=5, storage=storage)
    assert len(result.trials) == 5


def test_a_supernet_trained_on_and_another_base_have_studies_of_their_own(tmp_path: Path) -> None:
    file, calls = tmp_path / "study.db", [0]

    def evaluate(net: nn.Module) -> float:
        calls[-1] += 1
        return float(net(X).sum())

    for change in ("nothing", "the supernet", "the base"):
        model = build()
        base, supernet = model[4].parametrizations.bias.original, next(glora.parameters(model))
        with torch.no_grad():
            if change != "nothing":
                (base if change == "the base" else supernet).view(-1)[-1] += 1e-4
        calls.append(0)
        search(model, evaluate, budget=BUDGET, trials=3, storage=file)
        assert calls[-1] == 3
