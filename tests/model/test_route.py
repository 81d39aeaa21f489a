"""Each sample through its own adapter: equal to running it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
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


@settings(max_examples=60)
@given(st.lists(st.sampled_from([*"a", "b", None]), min_size=1, max_size=7), st.booleans(), st.booleans())
def test_a_model_gives_each_sample_its_own_adapter_and_head(names: list[str | None], tokens: bool, grad: bool) -> None:
    model = two_adapters()
    x = torch.randn(len(names), *([5] if tokens else []), 6)
    wanted = alone(model, x, names)
    with torch.set_grad_enabled(grad), glora.route(model, names) as routed:
        found = routed(x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(model(x), model(x))


@settings(max_examples=60)
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
        glora.apply(layer, config=glora.GLoRAConfig(init="random"), name=name)
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
            lambda: glora.apply(model, name="d"),
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
    attach(model, targets=["out_proj"], config=glora.GLoRAConfig(init="random"), name="a")
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
        glora.apply(layer, config=glora.GLoRAConfig(init="random"), name=name)
    model = nn.Sequential(layer)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 4)
    compiled(x)
    with glora.route(model, ["a", None, "b"]):
        torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x), model(x))


def test_merged_inside_a_route_is_refused_by_name() -> None:
    model = glora.apply(nn.Sequential(nn.Linear(4, 3)), config=RANDOM)
    with (
        glora.route(model, ["default", None]),
        pytest.raises(RuntimeError, match="Inside glora.route"),
        glora.merged(model),
    ):
        pass
