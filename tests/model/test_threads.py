"""Side by side: each thread's and task's route is its own, and a layer's forward is never torn by a change."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import glora
from tests.helpers.calls import RANDOM
from tests.helpers.interrupts import LIBRARY
from tests.helpers.kinds import KINDS


@pytest.fixture(autouse=True)
def often() -> Generator[None]:
    """Let threads take turns at almost every step."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


THREADS, REQUESTS, BATCH = 8, 200, 5
NAMES = ["a", "b", None]


def routed_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Linear(6, 3))
    for name in "ab":
        glora.apply(model, ["0", "2"], RANDOM, name=name, trainable=["3"])
    for name in "ab":
        glora.activate(model, name)
        with torch.no_grad():
            model[3].weight.add_(1.0 if name == "a" else -1.0)
    return model.eval()


def alone(model: nn.Module, x: Tensor) -> dict[str | None, Tensor]:
    """Each adapter's outputs of all samples, and the base model's."""
    outputs: dict[str | None, Tensor] = {}
    for name in NAMES:
        glora.activate(model, {} if name is None else name)
        outputs[name] = model(x)
    return outputs


def together(work: list[Callable[[], None]]) -> None:
    """Run all at once, from one start; an exception in any of them is raised here."""
    barrier = threading.Barrier(len(work))

    def started(one: Callable[[], None]) -> None:
        barrier.wait()
        one()

    with ThreadPoolExecutor(len(work)) as pool:
        for future in [pool.submit(started, one) for one in work]:
            future.result()


@torch.no_grad()
def test_each_thread_routes_its_own_samples() -> None:
    model, x = routed_model(), torch.randn(BATCH, 6)
    wanted = alone(model, x)
    glora.activate(model, "b")

    def serve(seed: int) -> None:
        draw = random.Random(seed)
        with torch.no_grad():
            for _ in range(REQUESTS):
                names = [draw.choice(NAMES) for _ in range(BATCH)]
                with glora.route(model, names):
                    y = model(x)
                for row, name in enumerate(names):
                    torch.testing.assert_close(y[row], wanted[name][row])

    def beside() -> None:
        with torch.no_grad():
            for _ in range(REQUESTS):
                torch.testing.assert_close(model(x), wanted["b"])

    together([*(lambda seed=seed: serve(seed) for seed in range(THREADS)), beside])
    torch.testing.assert_close(model(x), wanted["b"])


@torch.no_grad()
def test_each_task_routes_its_own_samples() -> None:
    model, x = routed_model(), torch.randn(BATCH, 6)
    wanted = alone(model, x)

    async def serve(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(20):
            names = [draw.choice(NAMES) for _ in range(BATCH)]
            with glora.route(model, names):
                await asyncio.sleep(0)  # the others run here, inside of this block
                y = model(x)
            for row, name in enumerate(names):
                torch.testing.assert_close(y[row], wanted[name][row])

    async def all_at_once() -> None:
        await asyncio.gather(*(serve(seed) for seed in range(THREADS)))

    asyncio.run(all_at_once())


def test_a_route_inside_a_route_of_the_same_model_alone_is_refused() -> None:
    model, other = routed_model(), routed_model()
    x = torch.randn(2, 6)
    wanted = alone(other, x)
    with glora.route(model, ["a", "b"]):
        with glora.route(other, ["b", None]):
            y = other(x)
        torch.testing.assert_close(y[0], wanted["b"][0])
        torch.testing.assert_close(y[1], wanted[None][1])
        with pytest.raises(RuntimeError, match="Inside glora.route"), glora.route(model, ["a", "a"]):
            pass


class Layer(NamedTuple):
    """A model of one module, and a call of it: its outputs tell by which adapter its weight and its bias were read."""

    model: nn.Module
    call: Callable[[nn.Module], Tensor]
    targets: list[str]


# Two tensors of a module are read one after the other, by forwards of glora's (nn.Linear's) and of everybody's own.
FORMS = {"A": "constant", "B": "none", "C": "none", "D": "constant", "E": "none"}
TWO_TENSORS = {str(kind): kind for kind in KINDS if kind.bias is not None}
LAYERS = ["Linear", "trainable LayerNorm", "grouped Conv2d", "in_proj", "experts with bias"]


def layer_of_two(name: str) -> Layer:
    if name in TWO_TENSORS:
        kind = TWO_TENSORS[name]
        model, x = kind.build().double(), kind.input()
        layer = Layer(model, lambda model: kind.call(model, x), [kind.path])
    else:
        model, x = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), torch.randn(3, 4)
        layer = Layer(model, lambda model: model["Norm" in name](x), ["0"])
    for adapter, size in (("one", 1.0), ("two", 2.0)):
        heads = ["1"] if "trainable" in name else ()
        glora.apply(model, layer.targets, glora.GLoRAConfig.glora(**FORMS), name=adapter, trainable=heads)
        with torch.no_grad():
            for parameter in glora.parameters(model, adapter):
                parameter.fill_(size)
    model.eval()
    return layer


# What reads a plain module's tensors, while it is merged for a while.
READERS = [sys.modules[cls.__module__].__file__ for cls in (nn.Linear, nn.Conv1d, nn.MultiheadAttention, nn.LayerNorm)]


def run_at_line(call: Callable[[], object], number: int, other: Callable[[], object]) -> bool:
    """Run `call`, and `other` in its midst: before a line of the library, or of torch's plain layers, that runs."""
    left = number

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        file = frame.f_code.co_filename
        if not file.startswith(LIBRARY) and file not in READERS:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                other()
        return trace

    before = sys.gettrace()  # a coverage tool's
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return left <= 0


def states_of(layer: Layer) -> list[Tensor]:
    states: list[Tensor] = []
    for weights in ({"one": 1.0}, {"two": 1.0}, {}):
        glora.activate(layer.model, weights)
        states.append(layer.call(layer.model))
    glora.activate(layer.model, "two")
    return states


def enter_and_leave(context: Callable[[nn.Module], Any]) -> list[Callable[[nn.Module], object]]:
    held: list[Any] = []

    def enter(layer: nn.Module) -> None:
        held.append(context(layer))
        held[-1].__enter__()

    def leave(_: nn.Module) -> None:
        held.pop().__exit__(None, None, None)

    return [enter, leave]


CHANGES: dict[str, Callable[[list[str]], list[Callable[[nn.Module], object]]]] = {
    "activate": lambda _: [lambda model: glora.activate(model, "one"), lambda model: glora.activate(model, "two")],
    "merged": lambda _: enter_and_leave(glora.merged),
    "disabled": lambda _: enter_and_leave(glora.disabled),
    "apply and delete": lambda targets: [
        lambda model: glora.apply(model, targets, name="three"),
        lambda model: glora.activate(glora.delete(model, "three"), "two"),
    ],
}


def is_one_of(states: list[Tensor], outputs: list[Tensor]) -> bool:
    return all(any(torch.allclose(y, state, atol=1e-5) for state in states) for y in outputs)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_forward_cut_by_a_change_at_any_line_gives_one_state_or_the_other(change: str, kind: str) -> None:
    layer = layer_of_two(kind)
    model, states, steps = layer.model, states_of(layer), CHANGES[change](layer.targets)
    outputs: list[Tensor] = []
    for number in range(1, 1000):
        cut: list[bool] = []
        for step in steps:
            cut.append(run_at_line(lambda: outputs.append(layer.call(model)), number, lambda step=step: step(model)))
            if not cut[-1]:
                step(model)
        if not any(cut):
            break
    assert len(outputs) > 30
    assert is_one_of(states, outputs)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_forward_at_any_line_of_a_change_gives_one_state_or_the_other(change: str, kind: str) -> None:
    layer = layer_of_two(kind)
    model, states, steps = layer.model, states_of(layer), CHANGES[change](layer.targets)
    outputs: list[Tensor] = []
    for number in range(1, 5000, 11 if change.startswith("apply") and kind != "Linear" else 1):  # apply has 800 lines
        within = [
            run_at_line(lambda step=step: step(model), number, lambda: outputs.append(layer.call(model)))
            for step in steps
        ]
        if not any(within):
            break
    assert len(outputs) > 30
    assert is_one_of(states, outputs)
