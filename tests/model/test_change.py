"""The door (Note [One door]): whatever public call changes a model, it goes through it, and it does all or nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import glora
from glora.model.change import Engine, engines
from tests.helpers.calls import quiet
from tests.helpers.changes import CHANGES, Change, one, saved, two
from tests.helpers.models import TOKENS, build
from tests.helpers.state import snapshot, unchanged, values_apart


def changes(kept: Callable[[Change], bool]) -> pytest.MarkDecorator:
    chosen = {name: change for name, change in CHANGES.items() if kept(change)}
    return pytest.mark.parametrize("change", chosen.values(), ids=chosen)


every_change = changes(lambda _: True)
taking_off = changes(lambda change: change.takes_off)
of_an_adapted_model = changes(lambda change: change.make is not build)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quiet():
        return saved(tmp_path_factory.mktemp("adapter"))


class Refusal(Exception):
    """What an engine of these tests raises."""


class Fake:
    """An engine that writes down what it is asked, and raises where it is told to."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.refuses: str | None = None

    def hook(self, name: str) -> Callable[..., None]:
        def call(model: nn.Module, *rest: Any) -> None:
            self.seen.append((name, model, *(value for value in rest if isinstance(value, bool))))
            if name == self.refuses:
                raise Refusal(name)

        return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    engine = Engine(made.hook("enter"), made.hook("refuse"), made.hook("leave"))
    monkeypatch.setattr("glora.model.change.engines", [*engines, engine])
    return made


def run(change: Change, model: nn.Module, folder: Path) -> None:
    with quiet():
        change.call(model, folder)


@every_change
def test_an_engine_is_told_before_and_once_after(change: Change, folder: Path, fake: Fake) -> None:
    model = change.make()
    fake.seen.clear()
    run(change, model, folder)
    names = [name for name, *_ in fake.seen]
    assert all(seen[1] is model for seen in fake.seen)
    assert names[-1] == "leave"
    assert names.count("leave") == 1
    assert names[0] == "enter"
    assert [seen[2] for seen in fake.seen if seen[0] == "refuse"] == ([True] if change.takes_off else [])


def test_an_engine_that_gives_back_for_a_while_is_asked_whether_it_can(fake: Fake) -> None:
    model = two()
    fake.seen.clear()
    with glora.merged(model):
        assert [(name, *rest) for name, _, *rest in fake.seen] == [("enter",), ("refuse", False)]
    assert [name for name, *_ in fake.seen].count("leave") == 0


@pytest.mark.parametrize("read", [glora.state_dict, glora.save], ids=["state_dict", "save"])
def test_an_engine_is_told_before_tensors_are_read(read: Callable[..., object], fake: Fake, tmp_path: Path) -> None:
    model = one()
    fake.seen.clear()
    read(model, *([tmp_path] if read is glora.save else []))
    assert {name for name, *_ in fake.seen} == {"enter"}


@taking_off
def test_where_an_engine_refuses_nothing_has_changed(change: Change, folder: Path, fake: Fake) -> None:
    model, fake.refuses = change.make(), "refuse"
    with unchanged(model), pytest.raises(Refusal):
        run(change, model, folder)


def test_where_an_engine_refuses_nothing_is_merged(fake: Fake) -> None:
    model, fake.refuses = two(), "refuse"
    with unchanged(model), pytest.raises(Refusal), glora.merged(model):
        pass


@every_change
def test_where_an_engine_cannot_let_the_tensors_be_read_nothing_has_changed(
    change: Change, folder: Path, fake: Fake
) -> None:
    model = change.make()
    fake.refuses = "enter"
    with unchanged(model), pytest.raises(Refusal):
        run(change, model, folder)


@every_change
def test_a_change_that_fails_at_its_very_end_is_taken_back(change: Change, folder: Path, fake: Fake) -> None:
    model = change.make()
    before, y = snapshot(model), model(TOKENS)
    fake.refuses = "leave"
    with pytest.raises(Refusal):
        run(change, model, folder)
    if not change.overwrites:
        assert snapshot(model) == before
        assert torch.equal(model(TOKENS), y)
    elif not change.takes_off:
        assert values_apart(snapshot(model)) == values_apart(before)


# Inside of what lasts for a while.


INSIDE: dict[str, Callable[[nn.Module], AbstractContextManager[object]]] = {
    "merged": glora.merged,
    "route": lambda model: glora.route(model, [next(iter(glora.adapters(model))), None]),
}


@of_an_adapted_model
@pytest.mark.parametrize("name", INSIDE)
def test_nothing_changes_a_model_that_is_merged_or_routed_for_a_while(name: str, change: Change, folder: Path) -> None:
    model = change.make()
    with INSIDE[name](model), unchanged(model), pytest.raises(RuntimeError, match=rf"Inside glora\.{name}"):
        run(change, model, folder)
    run(change, model, folder)  # and outside it can be changed again


@pytest.mark.parametrize("name", INSIDE)
def test_neither_is_entered_inside_a_route_nor_a_route_inside_merged(name: str) -> None:
    model = two()
    with glora.route(model, ["a", "b"]), pytest.raises(RuntimeError, match="Inside glora.route"), INSIDE[name](model):
        pass
    with glora.merged(model), pytest.raises(RuntimeError, match="Inside glora.merged"), INSIDE["route"](model):
        pass


# What takes adapters off finds them alone.


class Double(nn.Module):
    """Somebody else's parametrization."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@taking_off
@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_adapters_under_somebody_elses_parametrization_stay(change: Change, tensor: str, folder: Path) -> None:
    model = change.make()
    nn.utils.parametrize.register_parametrization(model.first, tensor, Double())
    with unchanged(model), pytest.raises(RuntimeError, match=rf"`{tensor}` of 'first' is parametrized by Double too"):
        run(change, model, folder)


class Frozen(dict[str, int]):
    """As diffusers' configs are."""

    def update(self, *_: object, **__: object) -> None:
        raise TypeError("frozen")

    clear = copy = update  # pyright: ignore


def test_a_change_that_fails_writes_into_no_dictionary_of_the_users() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    config = vars(model)["config"] = Frozen(size=4)
    with pytest.raises(ValueError, match="matches none"), unchanged(model):
        glora.apply(model, ["nowhere"], config=glora.GLoRAConfig.glora())
    assert vars(model)["config"] is config
