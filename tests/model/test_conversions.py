"""A model is moved to another dtype in whatever state it is, and all of it moves; a created bias comes and goes."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import glora
from tests.helpers.calls import attach, quiet
from tests.helpers.models import in_states
from tests.helpers.state import same

CREATE = glora.GLoRAConfig.glora(rank=2, init="random", create_bias=True)


def without_a_bias() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, 3))


def both(model: nn.Module) -> None:
    attach(model, CREATE, name="a", trainable=["1"])
    attach(model, glora.GLoRAConfig.lora(rank=1, init="random"), name="b")


HOW: dict[str, Callable[[nn.Module], object]] = {
    "acting": lambda model: attach(model, CREATE),
    "inactive": lambda model: glora.activate(attach(model, CREATE), {}),
    "beside another, inactive": both,
    "beside another, acting": lambda model: (both(model), glora.activate(model, "a")),
    "a head alone": lambda model: attach(model, CREATE, targets=["2"], trainable=["0", "1"]),
}
how = pytest.mark.parametrize("how", HOW.values(), ids=HOW)


@contextmanager
def disabled_inside_disabled(model: nn.Module) -> Generator[None]:
    with glora.disabled(model), glora.disabled(model):
        yield


CONVERSIONS: dict[str, tuple[torch.dtype, Callable[[nn.Module], object]]] = {
    "half": (torch.float16, lambda model: model.half()),
    "double": (torch.float64, lambda model: model.double()),
    "to": (torch.bfloat16, lambda model: model.to(torch.bfloat16)),
}


@how
@in_states
@pytest.mark.parametrize(("dtype", "convert"), CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_conversion_reaches_everything(
    how: Callable[[nn.Module], object],
    state: Callable[[nn.Module], AbstractContextManager[object]],
    dtype: torch.dtype,
    convert: Callable[[nn.Module], object],
) -> None:
    model = without_a_bias()
    how(model)
    with state(model):
        convert(model)
    x = torch.randn(5, 4, dtype=dtype)
    for name in [*glora.adapters(model), None]:
        glora.activate(model, {} if name is None else name)
        assert model(x).dtype == dtype
    base = {key: tensor for key, tensor in model.state_dict().items() if key.endswith("original")}
    assert {tensor.dtype for tensor in base.values()} == {dtype}
    glora.activate(model, {next(iter(glora.adapters(model))): 1.0})
    with quiet():
        glora.merge(model)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    assert model(x).dtype == dtype


@how
@pytest.mark.parametrize("nest", [nullcontext, glora.disabled, disabled_inside_disabled])
def test_inside_merged_a_created_bias_is_there_where_something_acts_on_it(
    how: Callable[[nn.Module], object], nest: Callable[..., AbstractContextManager[object]]
) -> None:
    model, x = without_a_bias(), torch.randn(5, 4)
    how(model)
    layer, names = model[0], list(model.state_dict())

    def acts() -> bool:
        return not isinstance(layer, nn.LayerNorm) and "E.value" in " ".join(
            key for name, weight in glora.adapters(layer).items() if weight for key in glora.state_dict(layer, name)
        )

    with nest(model):
        bias: Any = layer.bias
        there, y, base = acts(), model(x), glora.base_state_dict(model)
        with glora.merged(model):
            assert (layer.bias is not None) is there
            assert layer.bias is None or torch.equal(layer.bias, bias)
            assert ("0.bias" in model.state_dict()) is there
            assert ("0.bias" in dict(model.named_parameters())) is there
            assert same(glora.base_state_dict(model), base)
            assert "0.bias" not in base
            torch.testing.assert_close(model(x), y)
    assert list(model.state_dict()) == names
    assert same(glora.base_state_dict(model), without_a_bias().state_dict())
