"""Convolutions in half precision: the outputs are rounded once, and a small update survives."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import glora
from glora import GLoRAConfig
from tests.helpers.calls import attach, only
from tests.helpers.marks import examples
from tests.helpers.strategies import HALF, configs

# torch's own, of some shapes that are drawn.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Module:
    kind: Any = draw(st.sampled_from([nn.Conv1d, nn.Conv2d, nn.Conv3d]))
    options = {option: draw(st.sampled_from([1, 2])) for option in ("stride", "dilation")}
    modes = ["zeros", "replicate", "circular", *(["reflect"] if kind is not nn.Conv3d else [])]
    mode = draw(st.sampled_from(modes))
    padding = draw(st.sampled_from([0, 1, "valid", *(["same"] if options["stride"] == 1 else [])]))
    groups, bias = draw(st.sampled_from([1, 2, 4])), draw(st.booleans())
    return kind(4, 8, 2, groups=groups, bias=bias, padding=padding, padding_mode=mode, **options)


def input_of(layer: Any) -> Tensor:
    return torch.randn(3, 4, *[5] * len(layer.kernel_size))


def in_half(half: torch.dtype, autocast: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", half) if autocast else contextlib.nullcontext()


def adapted(layer: nn.Module, config: GLoRAConfig, half: torch.dtype, autocast: bool, size: float) -> nn.Sequential:
    model = nn.Sequential(layer if autocast else layer.to(half))
    attach(model, config, targets=["0"])
    with torch.no_grad():
        for factor in glora.parameters(model):
            factor.normal_().mul_(size)
    return model


def exact(model: nn.Sequential, plain: nn.Module, config: GLoRAConfig, half: torch.dtype) -> tuple[nn.Module, Tensor]:
    """The convolution in float64 with the update unrounded, all else rounded to half precision; and the update."""
    twin = attach(nn.Sequential(copy.deepcopy(plain).double()), config, targets=["0"])
    glora.load_state_dict(twin, glora.state_dict(model))
    layer, bias = glora.merge(twin)[0], model[0].bias
    with torch.no_grad():
        update = layer.weight - plain.weight.double()
        layer.weight.copy_(plain.weight.to(half).double() + update)
        if bias is not None:
            layer.bias.copy_(bias.to(half))
    return layer, update


def with_tensors(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer = copy.deepcopy(layer).requires_grad_(False)
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(torch.zeros(()) if bias is None else bias)
    return layer


@examples(40)
@given(
    layer=convolutions(),
    config=configs(create_bias=False),
    half=st.sampled_from(HALF),
    autocast=st.booleans(),
    grad=st.booleans(),
    mean=st.sampled_from([0.0, 20.0]),
    size=st.sampled_from([0.0, 1e-2, 1e-1]),
)
def test_outputs_are_rounded_once_beside_any_bias(
    layer: Any, config: GLoRAConfig, half: torch.dtype, autocast: bool, grad: bool, mean: float, size: float
) -> None:
    if layer.bias is not None:
        nn.init.constant_(layer.bias, mean)
    x, model = input_of(layer).to(half), adapted(copy.deepcopy(layer), config, half, autocast, size)
    layer, update = exact(model, layer if autocast else layer.to(half), config, half)
    with in_half(half, autocast), torch.set_grad_enabled(grad):
        y = model(x)
    assert y.dtype == half
    with torch.no_grad():
        wanted = layer(x.double())
        terms = with_tensors(layer, layer.weight.abs(), None if layer.bias is None else layer.bias.abs())(
            x.double().abs()
        )
        small = with_tensors(layer, update.abs(), None)(x.double().abs())
    bound = torch.finfo(half).eps * (wanted.abs() + 2 * small) + 1e-5 * terms
    assert bool(((y.double() - wanted).abs() <= bound + torch.finfo(half).tiny).all())


@examples(15)
@given(layer=convolutions(), config=configs(create_bias=False), half=st.sampled_from(HALF), autocast=st.booleans())
def test_gradients_are_those_of_double_precision(
    layer: Any, config: GLoRAConfig, half: torch.dtype, autocast: bool
) -> None:
    x, model = input_of(layer).to(half), adapted(copy.deepcopy(layer), config, half, autocast, 0.3)
    plain = layer if autocast else layer.to(half)
    twin = attach(nn.Sequential(copy.deepcopy(plain).double()), config, targets=["0"]).double()
    glora.load_state_dict(twin, glora.state_dict(model))
    grads: list[list[Tensor]] = []
    for each, given_x in ((model, x), (twin, x.double())):
        given_x.requires_grad_()
        with in_half(half, autocast) if each is model else contextlib.nullcontext():
            y = each(given_x)
        g = torch.ones_like(y)
        grads.append(list(torch.autograd.grad(y, [given_x, *glora.parameters(each)], g)))
    for found, wanted in zip(*grads, strict=True):
        assert (found.double() - wanted).norm() <= 0.05 * wanted.norm() + 0.05


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_exported_unbatched_and_routed_it_is_the_same(autocast: bool) -> None:
    torch._dynamo.reset()
    half, config = torch.bfloat16, only(A="lora", B="lora", rank=2)
    model = adapted(nn.Conv2d(4, 8, 3, padding=1), config, half, autocast, 0.05)
    x = torch.randn(4, 4, 6, 6).to(half)
    with in_half(half, autocast), torch.no_grad():
        wanted = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, wanted)
        torch.testing.assert_close(torch.stack([model(one) for one in x]), wanted)
        with glora.route(model, ["default", None, "default", None]):
            routed = model(x)
        torch.testing.assert_close(routed[::2], wanted[::2])
        with glora.disabled(model):
            torch.testing.assert_close(routed[1::2], model(x)[1::2])
            assert torch.equal(model(x), F.conv2d(x, model[0].weight, model[0].bias, padding=1))


def test_an_adapter_at_its_start_changes_little_and_a_merge_rounds_once() -> None:
    layer = nn.Conv2d(4, 8, 3, dtype=torch.bfloat16)
    x = torch.randn(2, 4, 6, 6, dtype=torch.bfloat16)
    before = layer(x)
    model = attach(nn.Sequential(layer), GLoRAConfig.glora(), targets=["0"])
    torch.testing.assert_close(model(x), before, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-3)
    with torch.no_grad():
        for factor in glora.parameters(model):
            factor.normal_().mul_(0.1)
    weight = model[0].weight
    assert torch.equal(glora.merge(model)[0].weight, weight)


@pytest.mark.parametrize("size", [0.01, 0.003])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("bias", [None, 2.0])
def test_a_small_update_survives_half_precision(bias: float | None, grad: bool, autocast: bool, size: float) -> None:
    estimate, dW = updates(bias, grad, autocast, size)  # invariant 7
    limit = {0.01: 0.05, 0.003: 0.1}[size]
    if bias is None:
        assert (estimate - dW).norm() / dW.norm() <= limit
    else:  # the outputs' own rounding is too coarse for each entry: the share that acts
        assert abs((estimate * dW).sum() / dW.square().sum() - 1) <= limit


def updates(bias: float | None, grad: bool, autocast: bool, size: float) -> tuple[Tensor, Tensor]:
    """The update that acts, by least squares from the change of the outputs, and the true one of `size` times W0."""
    layer = nn.Conv1d(64, 16, 4, stride=4, bias=bias is not None)
    if bias is not None:
        nn.init.constant_(layer.bias, bias)
    half, config = torch.bfloat16, only(B="lora")
    model = adapted(layer, config, half, autocast, 1.0)
    tensors = glora.state_dict(model)
    W0 = glora.base_state_dict(model)["0.weight"].flatten(1).float()
    tensors["0.B.left"].mul_(size * W0.norm() / (tensors["0.B.left"] @ tensors["0.B.right"]).norm())
    x = torch.randn(8, 64, 4 * 2048).to(half)
    with in_half(half, autocast), torch.set_grad_enabled(grad):
        y = model(x).detach()
        with glora.disabled(model):
            base = model(x).detach()
    change = (y.float() - base.float()).transpose(1, 2).flatten(0, 1)
    patches = x.float().unfold(2, 4, 4).transpose(1, 2).flatten(2).flatten(0, 1)
    estimate = torch.linalg.lstsq(patches, change).solution.T
    return estimate, tensors["0.B.left"] @ tensors["0.B.right"]
