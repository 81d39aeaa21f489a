"""Named adapters: names, `activate`, `disabled`, `delete`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from torch import nn

import glora
from tests.helpers.calls import RANDOM
from tests.helpers.models import Residual, build, three_adapters, two
from tests.helpers.state import same_outputs, unchanged
from tests.helpers.strategies import Case, cases


def test_names_are_checked() -> None:
    layer = nn.Linear(3, 3)
    for name in ("", "a.b", "forward", "training", "acting", 3):
        with pytest.raises(ValueError, match="An adapter's name must be"):
            glora.apply(layer, name=name)
    glora.apply(layer, name="values")
    with pytest.raises(ValueError, match="'values' is attached already"):
        glora.apply(layer, name="values")
    with pytest.raises(KeyError, match="'b'"):
        glora.state_dict(layer, "b")
    glora.apply(layer, name="b")
    with pytest.raises(ValueError, match="name=None means the only adapter; the model has 'values', 'b'"):
        glora.parameters(layer)
    with pytest.raises(ValueError, match="the model has none"):
        glora.state_dict(nn.Linear(2, 2))


CALLS: dict[str, Callable[[nn.Module, str | None], object]] = {
    "state_dict": glora.state_dict,
    "load_state_dict": lambda model, name: glora.load_state_dict(model, {}, name),
    "named_parameters": glora.named_parameters,
    "parameters": glora.parameters,
    "reset_parameters": glora.reset_parameters,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_name_means_the_only_adapter_and_an_unknown_one_is_a_key_error(
    call: Callable[[nn.Module, str | None], object],
) -> None:
    model = build()
    with pytest.raises(ValueError, match="only adapter"):
        call(model, None)
    two(model)
    with unchanged(model):
        with pytest.raises(ValueError, match="only adapter.*'a', 'b'"):
            call(model, None)
        with pytest.raises(KeyError, match=r"'c'.*'a', 'b'"):
            call(model, "c")


def test_activate_refuses_what_it_cannot_do() -> None:
    layer = glora.apply(nn.Linear(4, 3), name="a")
    with pytest.raises(KeyError, match="'b' is not an adapter of the model, which has 'a'"):
        glora.activate(layer, "b")
    for weight in (float("nan"), float("inf"), True, "1"):
        with pytest.raises(ValueError, match="finite number"):
            glora.activate(layer, {"a": weight})
    assert glora.adapters(layer) == {"a": 1.0}
    assert glora.adapters(glora.activate(layer, {})) == {"a": 0.0}


def test_activate_takes_a_name_or_a_mapping() -> None:
    layer = glora.apply(nn.Linear(4, 3))
    for weights in (5, None, ["default"], {"default": 10**400}):
        with pytest.raises(ValueError, match="weight"):
            glora.activate(layer, weights)


@given(cases())
def test_disabled_is_the_base_model_to_the_bit(case: Case) -> None:
    plain, layer, x = case.plain(), case.build(), case.input(4)
    y = layer(x)
    with glora.disabled(layer):
        assert same_outputs(layer(x), plain(x))
        assert set(glora.adapters(layer).values()) == {0.0}
        with glora.merged(layer):
            assert same_outputs(layer(x), plain(x))
            assert (layer.bias is None) == (plain.bias is None)
    assert glora.adapters(layer) == case.named_weights
    assert torch.equal(layer(x), y)


def test_an_adapter_attached_while_disabled_does_not_act_afterwards() -> None:
    layer = glora.apply(nn.Linear(3, 3), config=RANDOM, name="a")
    with glora.disabled(layer):
        glora.apply(layer, config=RANDOM, name="b")
    assert glora.adapters(layer) == {"a": 1.0, "b": 0.0}
    assert not any(p.requires_grad for p in glora.parameters(layer, "b"))


def test_delete_drops_one_adapter_and_the_last_one_is_remove() -> None:
    model = three_adapters()
    x = torch.randn(2, 6)
    glora.activate(model, "a")
    wanted, keys = model(x), list(glora.state_dict(model, "a"))
    with pytest.raises(KeyError):
        glora.delete(model, "z")
    glora.delete(model, "b")
    assert (set(glora.adapters(model)), list(glora.state_dict(model, "a"))) == ({"a", "c"}, keys)
    assert torch.equal(model(x), wanted)
    with glora.disabled(model):
        glora.delete(model, "a")
    assert glora.adapters(model) == {"c": 0.0}
    assert type(model.norm) is nn.LayerNorm
    glora.delete(model, "c")
    torch.manual_seed(0)
    plain = Residual()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())
