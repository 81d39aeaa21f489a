"""The search: under the budget, seeded, resumable, parallel, and unharmed by an evaluation that fails."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import glora
from glora.search import Result, Space, choose, evolve, extract
from tests.helpers.search import supernet

SPACE = Space(A=["vector", "constant", "none"], C=["none"], D=["none"], ranks=[1, 2])
SAMPLERS = ["nsga2", "random", "tpe"]


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def build() -> nn.Module:
    torch.manual_seed(3)
    return supernet(plain(), SPACE)


X = torch.linspace(-2, 2, 64).reshape(16, 4).sin()
BEST = {
    "0": SPACE.config({"A": "vector", "B": "lora"}, 2),
    "2": SPACE.config({"E": "vector"}, 1),
    "4": SPACE.config({"B": "vector", "E": "constant"}, 1),
}


def planted(model: nn.Module) -> Callable[[nn.Module], float]:
    """A score whose best choice is BEST: the closer to its outputs, the better."""
    with torch.no_grad():
        wanted = choose(model, BEST)(X)
        choose(model, None)
        return lambda net: -(net(X) - wanted).square().mean().item()


def search(model: nn.Module | None = None, evaluate: Any = None, **given: Any) -> Result:
    model = build() if model is None else model
    with torch.no_grad():
        return evolve(model, planted(model) if evaluate is None else evaluate, **given)


def study(result: Result) -> list[object]:
    return [(t.number, dict(t.targets), t.parameters, t.score, t.error) for t in result.trials]


BUDGET = glora.plan(plain(), BEST).parameters


def test_a_planted_best_choice_is_found_within_400_evaluations() -> None:
    # One of 72 choices (of 144 with the ranks) in each of three layers: random search would see one in a thousand.
    found: dict[str, list[Result]] = {}
    for sampler in ("nsga2", "random"):
        found[sampler] = [search(budget=BUDGET, trials=400, sampler=sampler, seed=seed) for seed in range(3)]
    hits = [result for result in found["nsga2"] if result.targets == BEST]
    assert len(hits) >= 2
    assert all((result.score, result.parameters) == (0.0, BUDGET) for result in hits)
    assert not any(result.targets == BEST for result in found["random"])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("budget", [0, 3, 20])
def test_no_evaluation_is_over_the_budget_or_repeated(sampler: str, budget: int) -> None:
    model, calls = build(), 0

    def evaluate(net: nn.Module) -> float:
        nonlocal calls
        calls += 1
        return float(net(X).sum())

    result = search(model, evaluate, budget=budget, trials=60, sampler=sampler)
    choices = [repr(sorted(trial.targets.items())) for trial in result.trials]
    assert len(set(choices)) == len(choices) == calls == (60 if budget else 1)  # there is one choice of nothing
    for trial in result.trials:
        assert trial.parameters <= budget
    for trial in result.trials[::7]:
        left = sum(p.numel() for p in glora.parameters(extract(build(), trial.targets))) if trial.targets else 0
        assert trial.parameters == left


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_reproduces_it_and_another_does_not(sampler: str) -> None:
    first = study(search(budget=BUDGET, trials=60, sampler=sampler))
    torch.manual_seed(9)
    assert study(search(budget=BUDGET, trials=60, sampler=sampler)) == first
    assert study(search(budget=BUDGET, trials=60, sampler=sampler, seed=1)) != first


def test_the_model_is_left_at_its_best_choice() -> None:
    model = build()
    evaluate = planted(model)
    result = search(model, evaluate, budget=BUDGET, trials=30)
    assert evaluate(model) == result.score == max(t.score for t in result.trials)
    assert type(model[0]) is type(build()[0])


def test_without_a_budget_the_front_has_both_ends() -> None:
    result = search(trials=150)
    numbers = [(t.parameters, t.score) for t in result.front]
    assert numbers == sorted(numbers)
    assert len(numbers) > 2
    assert all(a[1] < b[1] for a, b in itertools.pairwise(numbers))
    for trial in result.trials:
        at_least = [f for f in result.front if f.parameters <= trial.parameters and f.score >= trial.score]
        assert at_least
    assert result.front[-1].score == result.score


@pytest.mark.parametrize("wrong", [RuntimeError("no memory"), math.nan, math.inf, None])
def test_a_failed_evaluation_costs_its_trial_alone(wrong: Any) -> None:
    model, calls = build(), 0
    evaluate = planted(model)

    def failing(net: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            if isinstance(wrong, Exception):
                raise wrong
            return wrong
        return evaluate(net)

    result = search(model, failing, budget=BUDGET, trials=70)
    failed = [t for t in result.trials if t.score is None]
    assert len(result.trials) == calls == 70
    assert [t.number for t in failed] == list(range(2, 70, 3))
    assert all(t.error for t in failed)
    assert not any(t.error for t in result.trials if t.score is not None)
    assert result.score == max(t.score for t in result.trials if t.score is not None)


def test_when_all_fail_it_says_why_and_leaves_the_choice() -> None:
    model = choose(build(), BEST)
    y = model(X)
    with pytest.raises(RuntimeError, match="of 3 none did: ZeroDivisionError"):
        evolve(model, lambda _: 1 / 0, budget=BUDGET, trials=3)
    assert torch.equal(model(X), y)


@pytest.mark.parametrize("file", ["study.db", "study.journal"])
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
        assert study(resumed) == study(unbroken)


SCRIPT = """
import os, signal, sys, torch
sys.path[:0] = [sys.argv[1]]
from tests.search.test_evolution import BUDGET, build, planted, search
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
print(calls)
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


def test_killed_and_resumed_it_is_the_same_study(tmp_path: Path) -> None:
    first = process(tmp_path / "study.db", kill_at=53)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert study(search(budget=BUDGET, trials=60, storage=tmp_path / "study.db")) == study(
        search(budget=BUDGET, trials=60)
    )


@pytest.mark.parametrize("file", ["study.db", "study.journal"])
def test_two_processes_share_a_study_and_repeat_nothing(file: str, tmp_path: Path) -> None:
    both = [process(tmp_path / file, kill_at=0) for _ in range(2)]
    outputs = [one.communicate() for one in both]
    assert [one.returncode for one in both] == [0, 0], outputs
    calls = [int(output) for output, _ in outputs]
    result = search(budget=BUDGET, trials=60, storage=tmp_path / file)
    assert 60 <= len(result.trials) == sum(calls) <= 61
    assert len({repr(sorted(t.targets.items())) for t in result.trials}) == len(result.trials)


def test_a_search_beside_another_leaves_its_trials_alone(tmp_path: Path) -> None:
    model, inner = build(), []
    evaluate = planted(model)

    def beside(net: nn.Module) -> float:
        if not inner:  # a second one begins while the first one's trial is under way
            inner.append(search(budget=BUDGET, trials=20, storage=tmp_path / "study.db"))
        return evaluate(net)

    outer = search(model, beside, budget=BUDGET, trials=20, storage=tmp_path / "study.db")
    assert [t.number for t in inner[0].trials] == list(range(1, 20))
    assert [t.number for t in outer.trials] == list(range(20))
    assert len({repr(sorted(t.targets.items())) for t in outer.trials}) == 20


def test_other_arguments_are_another_study_in_the_same_storage(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    short = search(budget=BUDGET, trials=5, storage=file)
    assert len(search(budget=BUDGET, trials=8, storage=file).trials) == 8
    assert study(search(budget=BUDGET, trials=5, storage=file))[:5] == study(short)
    assert len(search(budget=BUDGET, trials=4, storage=file, seed=1).trials) == 4
    assert len(search(budget=BUDGET - 1, trials=4, storage=f"sqlite:///{file}").trials) == 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sampler": "grid"}, "sampler must be one of nsga2, tpe, random"),
        ({"trials": 0}, "trials an int of at least 1"),
        ({"budget": -1}, "must hold the smallest choice of the space, of 0 parameters"),
    ],
)
def test_wrong_arguments_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        search(**{"budget": BUDGET, **given})
    single = supernet(nn.Linear(3, 2), Space(A=["none"], B=["vector"], C=["none"], D=["none"], E=["none"]))
    with pytest.raises(ValueError, match="more than one choice"):
        evolve(single, lambda _: 0.0)
