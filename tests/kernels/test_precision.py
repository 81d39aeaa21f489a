"""Half precision: what is added up in it, what may overflow in it, and small updates that survive it."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import glora
from glora import functional
from tests.helpers import internals, reference
from tests.helpers.calls import attach, factors_of, only
from tests.helpers.kernels import KINDS, run_kernel
from tests.helpers.marks import examples, long
from tests.helpers.strategies import HALF, configs

kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)

modes = pytest.mark.parametrize("autocast", [False, True], ids=["half layer", "autocast"])

# With units for half precision, as most devices have, and without.
units = pytest.mark.parametrize("units", [False, True], ids=["loops", "units"])

halves = pytest.mark.parametrize("half", HALF, ids=str)
halves_compiled = pytest.mark.parametrize("half", [HALF[0], *map(long, HALF[1:])], ids=str)


def half_layer(
    out_features: int, in_features: int, config: glora.GLoRAConfig, half: torch.dtype, autocast: bool
) -> tuple[nn.Module, contextlib.AbstractContextManager[Any]]:
    """A layer over a base of half precision, or over one of float32 and the autocast to call it in."""
    layer = attach(nn.Linear(in_features, out_features, dtype=torch.float32 if autocast else half), config)
    return layer, torch.autocast("cpu", half) if autocast else contextlib.nullcontext()


@halves
@modes
@kinds
@units
@pytest.mark.parametrize("blocks", [1, 256])
def test_the_inputs_gradient_is_as_good_as_the_dense_kernels_in_any_number_of_blocks(
    blocks: int, units: bool, config: glora.GLoRAConfig, autocast: bool, half: torch.dtype
) -> None:
    layer, context = half_layer(256, 32, config, half, autocast)
    x, g = torch.randn(40, 32).to(half).requires_grad_(), torch.randn(40, 256).to(half)
    with context, internals.half_units(units), internals.entries_of_a_block(32 * 256 // blocks):
        exact = g.double() @ layer.weight.detach().double()
        (found,) = torch.autograd.grad(layer(x), x, g)
    # W' is rounded, and the result is.
    assert (found.double() - exact).norm() <= 1.0 * torch.finfo(half).eps * exact.norm()


@halves
@modes
@kinds
def test_a_biass_gradient_is_summed_over_the_tokens_in_single_precision(
    config: glora.GLoRAConfig, autocast: bool, half: torch.dtype
) -> None:
    (layer, context), tokens = half_layer(5, 6, config, half, autocast), 3001
    x, g = torch.randn(tokens, 6).to(half), (1 + torch.rand(tokens, 5)).to(half)
    with context:
        layer(x).backward(g)
    found, exact = dict[str, Any](glora.named_parameters(layer))["E.value"].grad, g.double().sum(0)
    # A bias of half precision has a gradient of half precision, rounded once; under autocast the bias is float32.
    eps = torch.finfo(torch.float32 if autocast else half).eps
    assert ((found - exact).abs() <= (8 if autocast else 0.5) * eps * exact).all()


PAIRS = {
    "B": (only(B="lora", rank=2, init="random"), "B"),
    "A": (only(A="lora", rank=2, init="random"), "A"),
    "A of a matrix product": (only(A="lora", product="matmul", rank=2, init="random"), "A"),
    "C": (only(C="lora", rank=2, init="random"), "C"),
}


@pytest.mark.parametrize(("config", "path"), PAIRS.values(), ids=PAIRS)
@halves
@modes
@pytest.mark.parametrize("tokens", [1, 60])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("size", [1e4, 1e7])
def test_how_a_product_is_split_between_its_factors_changes_nothing(
    size: float,
    grad: bool,
    tokens: int,
    autocast: bool,
    half: torch.dtype,
    config: glora.GLoRAConfig,
    path: str,
) -> None:
    layer, context = half_layer(24, 32, config, half, autocast)
    x = 16 * torch.randn(tokens, 32).to(torch.float32 if autocast else half)
    tensors = glora.state_dict(layer)
    left, right = (tensors[f"{path}.{factor}"] for factor in ("left", "right"))
    outputs: list[Tensor] = []
    with context, torch.set_grad_enabled(grad):
        for scale in (1.0, size, 1 / size):
            left /= scale
            right *= scale
            outputs.append(layer(x).detach().float())
            left *= scale
            right /= scale
    for y in outputs[1:]:
        assert (y - outputs[0]).norm() <= 4 * torch.finfo(half).eps * outputs[0].norm()


@halves
@kinds
def test_an_adapter_cast_to_half_precision_still_computes_in_single(
    config: glora.GLoRAConfig, half: torch.dtype
) -> None:
    layer = attach(nn.Linear(32, 24), config).to(half)  # the factors too
    wide, x = attach(nn.Linear(32, 24), config), torch.randn(8, 32).to(half)
    wide.load_state_dict({key: tensor.float() for key, tensor in layer.state_dict().items()})
    for each in (layer, wide):
        glora.activate(each, {"default": 0.7})
    # Rounded once: the bits of the float32 result, rounded.
    assert torch.equal(layer.weight, wide.weight.to(half))
    assert torch.equal(layer.bias, wide.bias.to(half))
    assert (layer(x) - wide(x.float())).norm() <= torch.finfo(half).eps * wide(x.float()).norm()
    layer(x).float().square().sum().backward()
    assert {factor.grad.dtype for factor in glora.parameters(layer)} == {half}


@halves_compiled
@modes
@kinds
def test_compiled_it_is_the_same_to_the_last_rounding(
    config: glora.GLoRAConfig, autocast: bool, half: torch.dtype
) -> None:
    torch._dynamo.reset()
    layer, context = half_layer(24, 32, config, half, autocast)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(60, 32).to(half).requires_grad_()
    factors, found = list(glora.parameters(layer)), list[list[Tensor]]()
    for run in (compiled, layer):
        with context:
            y = run(x)
            with torch.no_grad():
                without = run(x)
        found.append([y, without, *torch.autograd.grad(y.float().square().sum(), [x, *factors])])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= 2 * torch.finfo(half).eps * b.double().norm()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@units
@pytest.mark.parametrize(
    "config", [glora.GLoRAConfig.glora(), glora.GLoRAConfig.glora(A="vector"), glora.GLoRAConfig.lora()]
)
def test_half_precision_gradients_are_those_of_float32(
    half: torch.dtype, autocast: bool, units: bool, config: Any
) -> None:
    torch.manual_seed(1)
    config = glora.GLoRAConfig.glora(**{**config.forms, "init": "random"})
    layer = glora.apply(nn.Linear(48, 40), config=config)
    x = torch.randn(64, 48).to(half).float().requires_grad_()
    if not autocast:
        layer.to(half)
        for parameter in factors_of(layer):
            parameter.data = parameter.data.float()
    wide = glora.apply(nn.Linear(48, 40), config=config)
    wide.load_state_dict({k: v.float() for k, v in layer.state_dict().items()})
    wanted = run_kernel(wide, x, "dense")
    with internals.half_units(units), torch.autocast("cpu", half) if autocast else contextlib.nullcontext():
        found = run_kernel(layer, x if autocast else x.detach().to(half).requires_grad_(), None)
    assert found[0].dtype == half
    for a, b in zip(found, wanted, strict=True):
        assert (a.float() - b).norm() <= 0.03 * b.norm()


@examples(80)
@given(
    config=configs(init="identity"),
    half=st.sampled_from(HALF),
    autocast=st.booleans(),
    tokens=st.sampled_from([1, 2, 40]),
    units=st.booleans(),
    grad=st.booleans(),
    mean=st.sampled_from([0.0, 1.0, 20.0]),
    size=st.sampled_from([0.0, 1e-3, 1e-1]),
    seed=st.integers(0, 99),
)
def test_outputs_are_rounded_once_beside_any_bias(
    config: glora.GLoRAConfig,
    half: torch.dtype,
    autocast: bool,
    tokens: int,
    units: bool,
    grad: bool,
    mean: float,
    size: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(48, 24, dtype=torch.float32 if autocast else half)
    # Inputs and weights with a mean, which the bias takes away: the outputs are far smaller than what they are made of.
    x = (torch.randn(tokens, 48) + mean).to(half)
    with torch.no_grad():
        layer.weight += 0.1 * mean
        layer.bias.copy_(torch.randn(24) - x.float().mean(0) @ layer.weight.float().T)
    attach(layer, config)
    with torch.no_grad():
        for factor in glora.parameters(layer) if size else ():  # at 0, the identity: the base layer's own outputs
            factor.normal_().mul_(size)
        stack = layer.parametrizations.weight
        W0, factors = stack.original.double(), stack[0].factors(stack[0].acting.adapter_weights)
        updates = [u.expand_as(W0) for u in functional.weight_updates(W0, factors) if u is not None]
        update, bias, base = sum(updates), layer.bias.to(half).double(), W0.to(half).double()
    exact = reference.linear(x, base + update, bias)
    context = torch.autocast("cpu", half) if autocast else contextlib.nullcontext()
    with context, torch.set_grad_enabled(grad), internals.half_units(units):
        y = layer(x)
    assert y.dtype == half
    # Each is rounded: the sum, the update's own terms; what they are added up from is as exact as float32 makes it.
    terms = reference.linear(x.abs(), base.abs() + update.abs(), bias.abs())
    bound = torch.finfo(half).eps * (exact.abs() + 4 * reference.linear(x.abs(), update.abs(), None)) + 1e-5 * terms
    assert bool(((y.double() - exact).abs() <= bound + torch.finfo(half).tiny).all())


@examples(60)
@given(
    config=configs(init="identity"),
    autocast=st.booleans(),
    tokens=st.sampled_from([1, 40]),
    units=st.booleans(),
    grad=st.booleans(),
    large=st.booleans(),
)
def test_float16_is_finite_where_the_merged_layer_is(
    config: glora.GLoRAConfig, autocast: bool, tokens: int, units: bool, grad: bool, large: bool
) -> None:
    layer = nn.Linear(256, 2, dtype=torch.float32 if autocast else torch.float16)
    with torch.no_grad():  # either half of the product is above the largest float16
        layer.weight[:, :128], layer.weight[:, 128:] = 2.0, -2.0
    x = torch.full((tokens, 256), 300.0, dtype=torch.float16)
    x[:, 200] = 290
    attach(layer, config)
    tensors = glora.state_dict(layer)
    with torch.no_grad():
        if large and config.A in ("vector", "constant"):  # W' is as before, and A is large
            layer.parametrizations.weight.original.div_(1000)
            tensors["A.value"].fill_(999.0)
    with torch.autocast("cpu", torch.float16) if autocast else contextlib.nullcontext():
        with torch.set_grad_enabled(grad), internals.half_units(units):
            y = layer(x)
        with glora.merged(layer):
            wanted = layer(x)
    assert torch.isfinite(wanted).all()
    # Beside what is 300 times as large, W0 / 1000 is rounded.
    torch.testing.assert_close(y, wanted, rtol=1e-3, atol=40.0 if large else 0.1)


CASES = [
    *itertools.product(["lora", "B", "matmul", "vector"], ["bf16", "fp16", "autocast"], [0.01, 0.003]),
    *itertools.product(["constant", "expanded", "B vector", "matmul vector"], ["bf16"], [0.01, 0.003]),
]
# Each takes seconds: least squares needs many tokens, in half precision. The plain command has one of each name.
SURVIVAL: list[Any] = [case if case[1:] == ("bf16", 0.003) else long(*case) for case in CASES]


def updates(name: str, mode: str, size: float, bias: float | None = None) -> tuple[Tensor, Tensor]:
    """The update that acts, by least squares from the change of the outputs, and the true one of `size` times W0."""
    config = {
        "lora": only(A="lora", init="random"),
        "expanded": only(A="lora", rank=1, init="random"),
        "B": only(B="lora", init="random"),
        "vector": only(A="vector", init="random"),
        "constant": only(A="constant", init="random"),
        "B vector": only(B="vector", init="random"),
        "matmul vector": only(A="vector", product="matmul", init="random"),
        "matmul": only(A="lora", product="matmul", init="random"),
    }[name]
    half = torch.float16 if mode == "fp16" else torch.bfloat16
    layer = nn.Linear(256, 256, bias=bias is not None, dtype=torch.float32 if mode == "autocast" else half)
    if bias is not None:
        nn.init.constant_(layer.bias, bias)
    glora.apply(layer, config=config)
    W0 = layer.parametrizations.weight.original.float()

    def true_update() -> Tensor:
        tensors = glora.state_dict(layer)
        zero = torch.zeros(256, 1)
        scale = tensors.get("A.value", zero).expand(256, 256)
        if "A.left" in tensors:
            scale = tensors["A.left"] @ tensors["A.right"] * tensors["A.balance"]
        shift = tensors["B.left"] @ tensors["B.right"] if "B.left" in tensors else tensors.get("B.value", zero)
        return (W0 @ scale if name == "matmul" else W0 * scale) + shift

    with torch.no_grad(), internals.force_kernel("expanded" if name == "expanded" else None):
        first = next(glora.parameters(layer))
        first.mul_(size * W0.norm() / true_update().norm())
        x = torch.randn(32768, 256).to(half)
        with torch.autocast("cpu", half) if mode == "autocast" else contextlib.nullcontext():
            y = torch.cat([layer(part) for part in x.split(4096)])
            with glora.disabled(layer):
                base = torch.cat([layer(part) for part in x.split(4096)])
        dW = true_update()
        estimate = torch.linalg.lstsq(x.float(), y.float() - base.float()).solution.T
    return estimate, dW


@pytest.mark.parametrize(("name", "mode", "size"), SURVIVAL)
def test_a_small_update_survives_half_precision(name: str, mode: str, size: float) -> None:
    estimate, dW = updates(name, mode, size)  # invariant 7
    assert (estimate - dW).norm() / dW.norm() <= {0.01: 0.05, 0.003: 0.1}[size]
    # Most of that is the outputs' own rounding. What is lost shows in the share that acts: 7% at 0.3%, where the update
    # is added to a rounded product.
    assert abs((estimate * dW).sum() / dW.square().sum() - 1) <= 0.02


@pytest.mark.parametrize("size", [long(0.01), 0.003])
@pytest.mark.parametrize("name", [long("lora"), "B", long("vector")])
@pytest.mark.parametrize("mode", ["bf16", long("fp16"), "autocast"])
def test_it_survives_beside_a_large_bias(mode: str, name: str, size: float) -> None:
    # The outputs' own rounding, which every layer has, is too coarse for each entry of the update: the share that acts.
    estimate, dW = updates(name, mode, size, bias=2.0)
    assert abs((estimate * dW).sum() / dW.square().sum() - 1) <= {0.01: 0.05, 0.003: 0.1}[size]
