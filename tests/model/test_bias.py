"""Layers without a bias, and a bias that is created for them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import glora
from glora import GLoRAConfig
from tests.helpers.calls import refused, warned
from tests.helpers.models import ATTACH, Net, build, without_bias
from tests.helpers.state import snapshot


def test_without_a_bias_its_paths_are_left_out_with_one_warning() -> None:
    model = without_bias()
    planned = glora.plan(model, config=glora.GLoRAConfig.glora())
    assert {layer.path: layer.paths for layer in planned.layers} == {
        "0": ("A", "B"),
        "1": ("A", "B", "C", "D", "E"),
        "2": ("A", "B"),
    }
    assert planned.without_bias == ("0", "2")
    (message,) = warned(lambda: glora.apply(model, config=glora.GLoRAConfig.glora()))
    assert re.search(r"^2 layers have no bias.*C, D and E.*\(0, 2\).*create_bias=True", message)
    attached = {key.rpartition(".")[0] for key in glora.state_dict(model)}
    assert attached == {"0.A", "0.B", "1.A", "1.B", "1.C", "1.D", "1.E", "2.A", "2.B"}
    assert model[0].bias is None
    assert not parametrize.is_parametrized(model[0], "bias")


def test_a_layer_whose_paths_all_need_a_bias_is_left_out_and_named() -> None:
    model = without_bias()
    planned = glora.plan(model, config=GLoRAConfig.bitfit())
    assert [layer.path for layer in planned.layers] == ["1"]
    assert [skipped.path for skipped in planned.skipped] == ["0", "2"]
    (message,) = warned(lambda: glora.apply(model, config=GLoRAConfig.bitfit()))
    assert re.search(r"^2 layers have no bias.*\(0, 2\)", message)
    assert type(model[0]) is nn.Linear


def test_paths_that_need_no_bias_need_no_warning() -> None:
    assert warned(lambda: glora.apply(without_bias(), config=GLoRAConfig.glora(C="none", D="none", E="none"))) == []


@pytest.mark.parametrize("config", [GLoRAConfig.bitfit(), GLoRAConfig.prompt(), GLoRAConfig.glora(A="none", B="none")])
def test_nothing_left_to_train_in_the_whole_call_is_refused(config: GLoRAConfig) -> None:
    refused(nn.Linear(4, 4, bias=False), "something to train.*bias.*create_bias=True", "all-linear", config)
    refused(without_bias(), "something to train.*create_bias=True", ["0", "2"], config)


def test_no_path_at_all_is_refused() -> None:
    nothing = GLoRAConfig(A="none", B="none", C="none", D="none", E="none")
    refused(Net(), "something to train.*every path is none", "all-linear", nothing)
    # Also where there is a bias to create: D alone would have nothing to scale.
    scale = GLoRAConfig(A="none", B="none", C="none", D="vector", E="none", create_bias=True)
    refused(nn.Linear(4, 4, bias=False), "something to train", "all-linear", scale)


# create_bias=True.


CREATE = GLoRAConfig.glora(rank=1, init="random", create_bias=True)


def test_a_created_bias_is_frozen_zeros_without_a_warning() -> None:
    model = without_bias()
    assert warned(lambda: glora.apply(model, config=CREATE)) == []
    original = model[0].parametrizations.bias.original
    assert torch.equal(original, torch.zeros(4))
    assert not original.requires_grad
    assert not any(parameter is original for parameter in glora.parameters(model))


def test_a_created_bias_omits_D_and_a_bias_of_the_layers_own_does_not() -> None:
    model = without_bias()
    glora.apply(model, config=CREATE)
    paths = {key.rpartition(".")[0] for key in glora.state_dict(model)}
    assert {path for path in paths if path.startswith("0.")} == {"0.A", "0.B", "0.C", "0.E"}
    assert {path for path in paths if path.startswith("1.")} == {"1.A", "1.B", "1.C", "1.D", "1.E"}


def test_no_bias_is_created_where_no_path_asks_for_one() -> None:
    for config in (GLoRAConfig.lora(create_bias=True), GLoRAConfig.ia3(create_bias=True)):
        layer = glora.apply(nn.Linear(4, 4, bias=False), config=config)
        assert layer.bias is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_created_bias_has_the_weights_dtype(dtype: torch.dtype) -> None:
    layer = glora.apply(nn.Linear(4, 4, bias=False, dtype=dtype), config=CREATE)
    assert layer.bias.dtype == dtype
    assert layer(torch.randn(2, 4, dtype=dtype)).dtype == dtype


def test_a_created_bias_is_kept_by_merge() -> None:
    model, x = without_bias(), torch.randn(3, 4)
    glora.apply(model, config=CREATE)
    W0 = model[0].parametrizations.weight.original.clone()
    own = glora.state_dict(model)
    bias = own["0.E.value"] + (W0 @ own["0.C.value"]).squeeze(1)
    y = model(x)
    glora.merge(model)
    assert type(model[0]) is nn.Linear
    assert isinstance(model[0].bias, nn.Parameter)
    torch.testing.assert_close(model[0].bias.detach(), bias.clone())
    torch.testing.assert_close(model(x), y)


def test_a_created_bias_is_all_that_merge_adds() -> None:
    model = build()
    before = snapshot(model)
    ATTACH["created bias"](model)
    glora.merge(model)
    after = snapshot(model)
    assert isinstance(before["keys"], list)
    at = before["keys"].index("second.weight") + 1
    assert after["keys"] == [*before["keys"][:at], "second.bias", *before["keys"][at:]]
    assert after["types"] == before["types"]


def test_a_created_bias_is_dropped_by_a_merge_of_the_base() -> None:
    model = without_bias()
    before = snapshot(model)
    glora.activate(glora.apply(model, config=CREATE), {})
    with pytest.warns(UserWarning, match="'default'"):
        glora.merge(model)
    assert snapshot(model) == before


def test_two_adapters_share_a_created_bias() -> None:
    model = without_bias()
    before = snapshot(model)
    glora.apply(model, config=CREATE, name="first")
    glora.apply(model, config=CREATE, name="second")
    glora.activate(model, {"first": 1.0, "second": 1.0})
    bias = sum(
        glora.state_dict(model, name)["0.E.value"]
        + (model[0].parametrizations.weight.original @ glora.state_dict(model, name)["0.C.value"]).squeeze(1)
        for name in ("first", "second")
    )
    torch.testing.assert_close(model[0].bias.detach(), bias)
    glora.remove(model)
    assert model[0].bias is None
    assert snapshot(model) == before


def test_a_second_adapter_that_creates_no_bias_gets_no_paths_on_a_created_one() -> None:
    model = without_bias()
    glora.apply(model, config=CREATE, name="first")
    (message,) = warned(lambda: glora.apply(model, config=GLoRAConfig.glora(), name="second"))
    assert message.startswith("2 layers have no bias")
    assert {key for key in glora.state_dict(model, "second") if key[:3] in ("0.C", "0.D", "0.E")} == set()


@pytest.mark.parametrize("around", [False, True])
def test_a_bias_of_attention_is_not_created(around: bool) -> None:
    """torch's fast paths would take it for a whole set of biases, attached and merged."""
    options: Any = {"bias": False, "batch_first": True}
    model: Any = nn.TransformerEncoderLayer(4, 2, 8, **options) if around else nn.MultiheadAttention(4, 2, **options)
    with pytest.raises(ValueError, match="in_proj_weight' is not: .*one cannot be created"):
        glora.plan(model, ["in_proj_weight"], CREATE)
    with pytest.warns(UserWarning, match="cannot be created"):
        glora.apply(model, config=CREATE)
    call = (lambda x: model(x)) if around else lambda x: model(x, x, x)[0]
    x = torch.randn(2, 3, 4)
    wanted = call(x).detach()
    model.eval()
    with torch.no_grad():
        if not around:
            torch.testing.assert_close(call(x), wanted)
        assert call(x).isfinite().all()
        glora.merge(model)
        assert call(x).isfinite().all()
