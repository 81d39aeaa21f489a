"""A graph is pending while adapters are changed: its gradients are those of the forward that was run (Note [Pending
graphs], Note [Checkpoints])."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import glora
from tests.helpers.calls import attach, quiet
from tests.helpers.changes import CHANGES, saved
from tests.helpers.lifecycle import Net
from tests.helpers.models import TOKENS
from tests.helpers.strategies import configs

Run = Callable[[nn.Module, Tensor], Tensor]


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()


def nested(model: nn.Module, x: Tensor, *, use_reentrant: bool) -> Tensor:
    def inner(z: Tensor) -> Tensor:
        return model.head(model.second(z).tanh())

    def outer(z: Tensor) -> Tensor:
        return 2 * checkpoint(inner, model.first(z).tanh(), use_reentrant=use_reentrant)

    return checkpoint(outer, x, use_reentrant=use_reentrant) / 2


def reentrant(model: nn.Module, x: Tensor) -> Tensor:
    # It builds a graph only for an argument that asks for a gradient.
    return checkpoint(lambda x, _: model(x), x, torch.ones(1, requires_grad=True), use_reentrant=True)


RUNS: dict[str, Run] = {
    "plain": lambda model, x: model(x),
    "checkpointed": partial(checkpoint, use_reentrant=False),
    "checkpointed, reentrant": reentrant,
    "nested": partial(nested, use_reentrant=False),
    "nested, reentrant": partial(nested, use_reentrant=True),
}
every_run_of_a_model = pytest.mark.parametrize("run", list(RUNS.values())[:3], ids=list(RUNS)[:3])
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


def gradients(model: nn.Module, name: str) -> dict[str, Tensor | None]:
    return {key: parameter.grad for key, parameter in glora.named_parameters(model, name)}


def agree(found: dict[str, Tensor | None], right: dict[str, Tensor | None]) -> None:
    assert found.keys() == right.keys()
    for key, gradient in right.items():
        other = found[key]
        if gradient is None or other is None:
            assert not any(each.any() for each in (gradient, other) if each is not None), key
        else:
            torch.testing.assert_close(other, gradient, atol=1e-6, rtol=1e-5)


SWITCHES: dict[str, Callable[[nn.Module], AbstractContextManager[object]]] = {
    "the other": lambda model: nullcontext(glora.activate(model, "b")),
    "none": lambda model: nullcontext(glora.activate(model, {})),
    "both": lambda model: nullcontext(glora.activate(model, {"b": -0.7, "a": 0.5})),
    "another weight": lambda model: nullcontext(glora.activate(model, {"a": 0.5})),
    "disabled": glora.disabled,
    "apply": lambda model: nullcontext(
        glora.apply(model, ["first", "second"], name="c", config=glora.GLoRAConfig.glora())
    ),
    "there and back": lambda model: nullcontext(glora.activate(glora.activate(model, "b"), "a")),
    "delete another": lambda model: nullcontext(glora.delete(model, "b")),
}


@st.composite
def nets(draw: st.DrawFn) -> Callable[[], nn.Module]:
    """A model with two adapters, whose heads may be copies; made anew at each call, the same."""
    chosen = [draw(configs(bias_path=True)) for _ in range(4)]
    on_head = draw(st.booleans())

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = Net()
        for name, (first, second) in zip("ab", (chosen[:2], chosen[2:]), strict=True):
            targets = {"first": first, "second": second, **({"head": first} if on_head else {})}
            with quiet():
                glora.apply(model, targets, trainable=() if on_head else ["head"], name=name)
        return model

    return make


@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad"
)  # a nested region, without gradients at first
@given(make=nets(), switch=st.sampled_from(sorted(SWITCHES)), second=st.sampled_from(sorted(RUNS)))
@every_run
def test_a_switch_before_backward_changes_no_gradient(
    run: Run, make: Callable[[], nn.Module], switch: str, second: str
) -> None:
    right = {}
    for name in "ab":
        model = glora.activate(make(), name)
        model(X).square().sum().backward()
        right[name] = gradients(model, name)
    model = make()
    if switch in ("both", "apply"):
        glora.delete(model, "b")  # heads of two adapters do not act together
        attach(model, targets=["first", "second"], name="b")
    loss = run(glora.activate(model, "a"), X).square().sum()
    flags = {key: p.requires_grad for key, p in glora.named_parameters(model, "a")}
    with quiet(), SWITCHES[switch](model):
        loss.backward()
    agree(gradients(model, "a"), right["a"])
    assert switch != "there and back" or flags == {k: p.requires_grad for k, p in glora.named_parameters(model, "a")}
    if switch == "the other":  # and two terms of one loss
        model = make()
        terms = [
            each(glora.activate(model, name), X).square().sum()
            for name, each in zip("ab", (run, RUNS[second]), strict=True)
        ]
        torch.stack(terms).sum().backward()
        for name in "ab":
            agree(gradients(model, name), right[name])
        assert not any(p.requires_grad for p in glora.parameters(model, "a")), "the inactive adapter is frozen again"
        assert all(p.requires_grad for p in glora.parameters(model, "b"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quiet():
        return saved(tmp_path_factory.mktemp("adapter"))


@every_run_of_a_model
@pytest.mark.parametrize("name", sorted(CHANGES.keys() - {"apply the first"}))  # it freezes what a pending graph trains
def test_after_any_change_the_gradients_are_right_or_backward_raises(name: str, run: Run, folder: Path) -> None:
    change = CHANGES[name]
    if run is reentrant and name in ("delete the last", "remove", "merge"):
        return  # a plain module runs a second time without the library, and torch says nothing

    def pending() -> tuple[nn.Module, Tensor, list[nn.Parameter]]:
        torch.manual_seed(0)
        model = change.make().train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, run(model, TOKENS).square().sum(), trained

    _, loss, right = pending()
    loss.backward()
    model, loss, trained = pending()
    with quiet():
        change.call(model, folder)
    may_refuse = change.overwrites or (run is not RUNS["plain"] and "activate" not in name)
    try:
        loss.backward()
    except RuntimeError:
        if not may_refuse:
            raise
        return
    agree(*({str(i): p.grad for i, p in enumerate(parameters)} for parameters in (trained, right)))


def switching(model: nn.Module, x: Tensor) -> Tensor:
    glora.activate(model, "a")
    y = model(x).tanh()
    glora.activate(model, "b")
    return y * model(x)


def beside_the_base(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    with glora.disabled(model):
        return y * model(x)


@pytest.mark.parametrize("region", [switching, beside_the_base])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_region_may_switch_adapters_itself(region: Run, use_reentrant: bool) -> None:
    found: list[dict[str, Tensor | None]] = []
    X.grad = None
    for run in (region, partial(checkpoint, region, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        model = attach(attach(nn.Linear(3, 4), name="b"), name="a")
        loss = run(model, X).square().sum()
        glora.activate(model, "b")
        loss.backward()
        found.append(gradients(model, "a") | {"x": X.grad})
        X.grad = None
    agree(found[1], found[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_regions_in_sequence_are_known(use_reentrant: bool) -> None:
    model = attach(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    model(X).square().sum().backward()
    right = gradients(model, "default")
    for parameter in glora.parameters(model):
        parameter.grad = None
    checkpoint_sequential(model, 2, X, use_reentrant=use_reentrant).square().sum().backward()
    agree(gradients(model, "default"), right)


def test_the_hooks_on_frozen_adapters_keep_no_memory() -> None:
    model = attach(attach(nn.Linear(3, 4), name="a"), name="b")
    held = [weakref.ref(parameter) for parameter in glora.parameters(model, "a")]
    glora.delete(model, "a")
    gc.collect()
    assert not any(reference() is not None for reference in held)
