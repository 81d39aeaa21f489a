"""Each sample through its own adapter: equal to running it alone, in any dimension and over flattened rows."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import glora
from tests.helpers.calls import RANDOM, attach
from tests.helpers.models import two_adapters
from tests.helpers.strategies import Case, cases, close


def alone(model: nn.Module, x: Tensor, names: list[str | None]) -> Tensor:
    before = {name: weight for name, weight in glora.adapters(model).items() if weight}
    rows: list[Tensor] = []
    for sample, name in zip(x, names, strict=True):
        glora.activate(model, {} if name is None else name)
        rows.append(model(sample[None])[0])
    glora.activate(model, before)
    return torch.stack(rows)


@given(st.lists(st.sampled_from([*"a", "b", None]), min_size=1, max_size=7), st.booleans(), st.booleans())
def test_a_model_gives_each_sample_its_own_adapter_and_head(names: list[str | None], tokens: bool, grad: bool) -> None:
    model = two_adapters()
    x = torch.randn(len(names), *([5] if tokens else []), 6)
    wanted = alone(model, x, names)
    with torch.set_grad_enabled(grad), glora.route(model, names) as routed:
        found = routed(x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(model(x), model(x))


@given(cases(dtypes=[torch.float32, torch.float64]), st.lists(st.integers(-1, 2), min_size=1, max_size=6))
def test_every_form_is_routed(case: Case, choice: list[int]) -> None:
    layer = case.build()
    there = list(glora.adapters(layer))
    names = [None if i < 0 else there[i % len(there)] for i in choice]
    x = case.input(len(names))
    wanted, active = alone(layer, x, names), glora.adapters(layer)
    with glora.route(layer, names):
        found = layer(x)
    assert close(found, wanted.double(), ulps=2000)
    assert glora.adapters(layer) == active


def test_active_adapters_train_inside() -> None:
    layer = nn.Linear(4, 3)
    for name in "abc":
        glora.apply(layer, config=glora.GLoRAConfig.glora(init="random"), name=name)
    glora.activate(layer, {"a": 1.0, "b": 1.0})
    x = torch.randn(4, 4)
    with glora.route(layer, ["a", None, "b", "c"]):
        y = layer(x)
    y[:3].sum().backward()
    grads = {name: [p.grad for p in glora.parameters(layer, name)] for name in "abc"}
    assert all(g is not None for name in "ab" for g in grads[name])
    assert all(g is None for g in grads["c"])


def test_what_is_refused() -> None:
    model = two_adapters()
    x = torch.randn(3, 6)
    with pytest.raises(KeyError, match="'z'"), glora.route(model, ["a", "z"]):
        pass
    for names in ("ab", []):
        with pytest.raises(ValueError, match="each sample"), glora.route(model, names):
            pass
    with glora.route(model, ["a", "b"]):
        with pytest.raises(ValueError, match="2 names, and 'norm'"):
            model(x)
        for change in (
            lambda: glora.activate(model, "a"),
            lambda: glora.delete(model, "a"),
            lambda: glora.merge(model),
            lambda: glora.apply(model, name="d", config=glora.GLoRAConfig.glora()),
            lambda: glora.route(model, ["a"]).__enter__(),
        ):
            with pytest.raises(RuntimeError, match=r"Inside glora\.route"):
                change()
        with pytest.raises(RuntimeError, match="'up' was read"):
            _ = model.up.weight
    with glora.merged(model), pytest.raises(RuntimeError, match=r"Inside glora\.merged"), glora.route(model, ["a"]):
        pass


def test_a_weight_that_is_read_and_not_called_is_named() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2, batch_first=True))
    attach(model, targets=["out_proj"], config=glora.GLoRAConfig.glora(init="random"), name="a")
    x = torch.randn(2, 3, 4)
    with glora.route(model, ["a", None]), pytest.raises(RuntimeError, match="out_proj' was read"):
        model[0](x, x, x)


def test_after_an_exception_everything_is_as_before() -> None:
    model, x = two_adapters(), torch.randn(2, 6)
    wanted, flags = model(x), [p.requires_grad for p in model.parameters()]
    handle = model.down.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), glora.route(model, ["a", None]):
        model(x)
    handle.remove()
    assert torch.equal(model(x), wanted)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all("forward" not in vars(module) for module in model.modules())


def test_disabled_inside_is_the_base_model_and_an_own_forward_comes_back() -> None:
    model, x = two_adapters(), torch.randn(2, 6)
    with glora.disabled(model):
        base = model(x)
    own: Any = model.up.forward
    model.up.forward = own
    with glora.route(model, ["a", "b"]):
        routed = model(x)
        with glora.disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), routed)
    assert vars(model.up)["forward"] == own


def test_a_compiled_model_is_routed_too() -> None:
    torch._dynamo.reset()
    layer = nn.Linear(4, 3)
    for name in "abc":
        glora.apply(layer, config=glora.GLoRAConfig.glora(init="random"), name=name)
    model = nn.Sequential(layer)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 4)
    compiled(x)
    with glora.route(model, ["a", None, "b"]):
        torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x), model(x))


NAMES = st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=5)


class Flattening(nn.Module):
    """Flattens samples and tokens into rows in front of its layer, as OPT does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, 4)).reshape(*x.shape[:-1], 3)


def with_two(model: Any) -> Any:
    torch.manual_seed(0)
    for name in ("a", "b"):
        glora.apply(model, config=RANDOM, name=name)
    return model.eval()


def alone_through(model: Any, x: Tensor, name: str | None) -> Tensor:
    glora.activate(model, {} if name is None else name)
    return model(x)


@given(names=NAMES, tokens=st.integers(1, 4))
def test_flattened_rows_go_through_their_samples_adapter(names: list[str | None], tokens: int) -> None:
    model = with_two(Flattening())
    x = torch.randn(len(names), tokens, 4)
    expected = torch.cat([alone_through(model, x[i : i + 1], name) for i, name in enumerate(names)])
    with glora.route(model, names, flattened=True):
        assert torch.allclose(model(x), expected, atol=1e-6)


@given(names=NAMES, tokens=st.integers(1, 5))
def test_a_batch_in_dimension_one_is_split_there_also_when_the_sizes_are_equal(
    names: list[str | None], tokens: int
) -> None:
    model = with_two(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    x = torch.randn(tokens, len(names), 4)
    expected = torch.cat([alone_through(model, x[:, i : i + 1], name) for i, name in enumerate(names)], 1)
    with glora.route(model, names, dim=1):
        assert torch.allclose(model(x), expected, atol=1e-6)


def test_rows_are_refused_unless_they_are_said_to_be_flattened() -> None:
    model = with_two(Flattening())
    with glora.route(model, ["a", "b"]), pytest.raises(ValueError, match="flattened=True"):
        model(torch.randn(2, 3, 4))
    with glora.route(model, ["a", "b", "a"], flattened=True), pytest.raises(ValueError, match="not that many samples"):
        model(torch.randn(2, 2, 4))
    with glora.route(model, ["a", "b"], dim=2), pytest.raises(ValueError, match="dimension 2"):
        model(torch.randn(2, 2, 4))


@pytest.mark.parametrize("dim", [-1, 0.5, None])
def test_a_dim_that_is_none_is_refused(dim: Any) -> None:
    model = with_two(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="dim must be"), glora.route(model, ["a"], dim=dim):
        pass


def test_attention_that_is_adapted_itself_is_routed_with_its_output_projection() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    for name in ("a", "b"):
        glora.apply(attention, config=RANDOM, name=name)
    x = torch.randn(3, 5, 4)
    expected = []
    for i, name in enumerate(["a", None, "b"]):
        glora.activate(attention, {} if name is None else name)
        expected.append(attention(x[i : i + 1], x[i : i + 1], x[i : i + 1])[0])
    with glora.route(attention, ["a", None, "b"]):
        assert torch.allclose(attention(x, x, x)[0], torch.cat(expected), atol=1e-6)


class Over(nn.Linear):
    """A layer that has another inside."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.inner = nn.Linear(4, 4)

    def forward(self, input: Tensor) -> Tensor:
        return self.inner(super().forward(input))


def from_a_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


NESTINGS = ["route, disabled", "disabled, route", "disabled, disabled and back, route", "route, disabled by a thread"]


@pytest.mark.parametrize("part", ["", "0.inner", "1"])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_disabling_wins_over_a_route_in_any_nesting(nesting: str, part: str) -> None:
    """Also of a part of the model alone: the rest is routed."""
    model: Any = with_two(nn.Sequential(Over(), nn.Linear(4, 3)))
    names, x = ["a", None, "b"], torch.randn(3, 4)
    wanted = []
    for i, name in enumerate(names):
        glora.activate(model, {} if name is None else name)
        with glora.disabled(model.get_submodule(part)):
            wanted.append(model(x[i : i + 1]))
    with glora.route(model, names):
        routed = model(x)

    def enter(stack: ExitStack) -> None:
        for step in nesting.split(", "):
            if step == "route":
                stack.enter_context(glora.route(model, names))
            elif step == "disabled and back":
                with glora.disabled(model):
                    pass
            elif step == "disabled":
                stack.enter_context(glora.disabled(model.get_submodule(part)))
            else:
                disabled = glora.disabled(model.get_submodule(part))
                from_a_thread(disabled.__enter__)
                stack.callback(from_a_thread, partial(disabled.__exit__, None, None, None))

    with ExitStack() as stack:
        enter(stack)
        torch.testing.assert_close(model(x), torch.cat(wanted))
        if part == "":
            assert torch.equal(model[1].weight, model[1].parametrizations.weight.original)
    with glora.route(model, names):
        torch.testing.assert_close(model(x), routed)
