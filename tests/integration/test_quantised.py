"""Bases that torchao has quantised: adapters attach to them, train, save, and are merged when told to dequantise."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import glora
from glora import GLoRAConfig
from tests.helpers.calls import RANDOM, refused
from tests.helpers.models import adapted_block
from tests.helpers.quantised import FORMS, block, differences, most_floats, of_layers
from tests.helpers.state import unchanged

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

KINDS = ("int8", "int8 in groups", "int8 one scale", "int4", "int4 in groups", "float8")


def config_of(kind: str) -> Any:
    ao: Any = pytest.importorskip("torchao.quantization")
    granularity: Any = pytest.importorskip("torchao.quantization.granularity")
    return {
        "int8": lambda: ao.Int8WeightOnlyConfig(),
        "int8 in groups": lambda: ao.Int8WeightOnlyConfig(granularity=granularity.PerGroup(32)),
        "int8 one scale": lambda: ao.Int8WeightOnlyConfig(granularity=granularity.PerTensor()),
        "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4),
        "int4 in groups": lambda: ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=granularity.PerGroup(32)
        ),
        "float8": lambda: ao.Float8WeightOnlyConfig(),
        "int8, inputs too": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
    }[kind]()


def quantise(model: nn.Module, kind: str) -> nn.Module:
    ao: Any = pytest.importorskip("torchao.quantization")
    ao.quantize_(model, config_of(kind))
    return model


@pytest.mark.parametrize(("bias", "config"), of_layers(FORMS))
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_equals_the_float_model_and_trains_as_it_does(kind: str, bias: bool, config: GLoRAConfig) -> None:
    def quantise_kind(model: nn.Module) -> nn.Module:
        return quantise(model, kind)

    for rows in (10, 64):  # in several blocks, and in one
        assert max(differences(quantise_kind, config, bias=bias, rows=rows).values()) < 1e-4
        assert max(differences(quantise_kind, config, torch.bfloat16, bias, rows).values()) < 0.05


@pytest.mark.parametrize("form", [form for form, config in FORMS.items() if (config.A, config.B) != ("none", "none")])
@pytest.mark.parametrize("kind", KINDS)
def test_no_float_tensor_is_as_large_as_the_weight(kind: str, form: str) -> None:
    assert most_floats(lambda model: quantise(model, kind), FORMS[form], rows=16) <= 16 * 64
    assert most_floats(lambda model: quantise(model, kind), FORMS[form], rows=64) == 64 * 64


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_life_of_an_adapter(kind: str, tmp_path: Path) -> None:
    model = quantise(block(), kind)
    source = copy.deepcopy(model)
    x, W0, keys, before = torch.randn(3, 64), model[0].weight, list(model.state_dict()), model(torch.ones(2, 64))
    pending = model(x.clone().requires_grad_())  # a graph that holds W0
    glora.apply(model, config=glora.GLoRAConfig.glora())
    pending.sum().backward()
    optimizer = torch.optim.Adam(glora.parameters(model), 1e-2)
    losses: list[float] = []
    for _ in range(5):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    with glora.disabled(model):
        assert torch.equal(model(torch.ones(2, 64)), before)
    assert list(glora.base_state_dict(model)) == keys
    glora.save(model, tmp_path)
    assert torch.equal(glora.load(copy.deepcopy(source), tmp_path, strict=True)(x), model(x))
    with pytest.raises(glora.AdapterFileError, match="trained beside others"):
        glora.load(quantise(block(), kind), tmp_path, strict=True)
    given, y = model.state_dict(), model(x)
    model.load_state_dict(source.state_dict())  # plain keys of the base
    model.load_state_dict(given)
    assert torch.equal(model(x), y)
    assert torch.equal(copy.deepcopy(model)(x), y)
    glora.remove(model)
    assert model[0].weight is W0
    assert (type(model[0]), list(model.state_dict())) == (nn.Linear, keys)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_dequantises_when_told_to(kind: str) -> None:
    model = glora.apply(quantise(block(), kind), config=RANDOM)
    y = model(x := torch.randn(3, 64))
    with unchanged(model), pytest.raises(ValueError, match=r"Nothing was merged. Pass dequantize=True"):
        glora.merge(model)
    glora.merge(model, dequantize=True)
    assert (type(model[0]), type(model[0].weight)) == (nn.Linear, nn.Parameter)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    quantise(model, kind)  # again
    torch.testing.assert_close(model(x), y, rtol=0.3, atol=0.3)
    assert type(model[0].weight) is not nn.Parameter


@pytest.mark.parametrize("kind", ["int8", "int4 in groups"])
@pytest.mark.parametrize("config", [RANDOM, GLoRAConfig.lora(rank=2, init="random")], ids=["blockwise", "factored"])
def test_one_graph_compiled(kind: str, config: GLoRAConfig) -> None:
    model, x = glora.apply(quantise(block(), kind), config=config), torch.randn(3, 64)
    results: list[list[torch.Tensor]] = []
    for each in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        loss = each(x).square().sum()
        results.append([loss, *torch.autograd.grad(loss, list(glora.parameters(model)))])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_inputs_that_are_quantised_too_are_refused() -> None:
    refused(quantise(block(), "int8, inputs too"), "inputs too .act_quant.*quantise weights only", ["0"])


def test_quantised_after_a_merge_and_not_while_attached() -> None:
    model, x = adapted_block(), torch.randn(3, 6)
    expected = model(x)
    with pytest.raises(RuntimeError, match=r"as tying and quantising do.*before glora.apply, or after glora.merge"):
        quantise(copy.deepcopy(model), "int8")
    quantise(glora.merge(model), "int8")
    torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.1)
    assert type(model[0].weight) is not nn.Parameter


@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_bitsandbytes_is_refused_by_name(kind: str) -> None:
    library: Any = pytest.importorskip("bitsandbytes")
    options: dict[str, Any] = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
    layer = getattr(library.nn, kind)(64, 32, **options)
    for state in ("before it is quantised", "quantised", "used"):
        if state == "quantised":
            layer.to("cpu")
        elif state == "used":
            layer(torch.randn(3, 64))
        for config in (RANDOM, GLoRAConfig.bitfit()):
            with pytest.raises(ValueError, match=f"it is bitsandbytes' {kind}, .*quantise with torchao"):
                glora.apply(nn.Sequential(layer), ["0"], config)
    model = nn.Sequential(layer, nn.Linear(32, 4))
    assert [row.path for row in glora.plan(model, config=glora.GLoRAConfig.glora()).skipped] == ["0"]
