"""The short ways through a layer: the same function as the whole W', at the cost that was promised."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import glora
from benchmarks.counting import count_products, count_saved
from glora.config import FORMS
from tests import reference
from tests.strategies import Case, cases, close, expected, silent_apply

SHAPES = [(5,), (2, 3), (1, 2, 2), (0,), (1,), (), (40, 3)]


def factors_of(layer: nn.Module) -> list[nn.Parameter]:
    return [p for name in glora.adapters(layer) for p in glora.parameters(layer, name)]


def run(layer: nn.Module, x: Tensor, way: Any, grad: bool = True) -> list[Tensor]:
    """Output, and the gradients of the input and of every factor."""
    with glora.ways.force(way), torch.set_grad_enabled(grad):
        y = layer(x)
        if not grad:
            return [y]
        torch.manual_seed(0)
        sources = [x, *factors_of(layer)]
        # A factor that is multiplied by nothing (no tokens) may have no gradient at all.
        grads = torch.autograd.grad(y, sources, torch.randn_like(y), allow_unused=True)
        return [y, *(torch.zeros_like(s) if g is None else g for s, g in zip(sources, grads, strict=True))]


@settings(max_examples=200)
@given(
    cases(dtypes=[torch.float64, torch.float32]),
    st.sampled_from(SHAPES),
    st.sampled_from(["factored", "blocks"]),
    st.sampled_from([1, 11, 2**21]),
)
def test_every_way_is_the_whole_one_and_the_reference(case: Case, shape: tuple[int, ...], way: str, block: int) -> None:
    layer = case.build()
    x = case.input(*shape) if shape else torch.randn(case.in_features, dtype=case.dtype)
    x.requires_grad_()
    with mock.patch("glora.blocks.CPU_BLOCK", block):
        short = run(layer, x, way)
    whole = run(layer, x, "whole")
    assert [t.shape for t in short] == [t.shape for t in whole]
    for a, b in zip(short, whole, strict=True):
        assert a.dtype == b.dtype
        assert close(a, b.double(), ulps=2000)
    plain = case.plain()
    weight, bias = expected(layer, case, plain.weight.detach(), None if plain.bias is None else plain.bias.detach())
    assert close(short[0], reference.linear(x.detach(), weight, bias), ulps=2000)


@settings(max_examples=100)
@given(cases(), st.sampled_from(SHAPES), st.booleans())
def test_without_gradients_every_way_is_the_reference_in_every_dtype(
    case: Case, shape: tuple[int, ...], few: bool
) -> None:
    layer = case.build()
    x = case.input(*shape) if shape else torch.randn(case.in_features).to(case.dtype)
    plain = case.plain()
    weight, bias = expected(layer, case, plain.weight.detach(), None if plain.bias is None else plain.bias.detach())
    (y,) = run(layer, x, "few" if few else "blocks", grad=False)
    assert y.dtype == case.dtype
    size = 64 if case.dtype in (torch.bfloat16, torch.float16) else 2000
    wanted = reference.linear(x, weight, bias)
    # In half precision terms are rounded at the size of the terms, not of their sum.
    terms = reference.linear(x.abs(), weight.abs() + plain.weight.abs(), bias.abs())
    bound = size * torch.finfo(case.dtype).eps * torch.clamp(terms, min=1.0)
    assert y.shape == wanted.shape
    assert bool(((y.double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("config", [glora.GLoRAConfig(), glora.GLoRAConfig(A="vector"), glora.GLoRAConfig.lora()])
def test_half_precision_gradients_are_those_of_float32(half: torch.dtype, autocast: bool, config: Any) -> None:
    torch.manual_seed(1)
    config = glora.GLoRAConfig(**{**config.forms, "init": "random"})
    layer = glora.apply(nn.Linear(48, 40), config=config)
    x = torch.randn(64, 48).to(half).float().requires_grad_()
    if not autocast:
        layer.to(half)
        for parameter in factors_of(layer):
            parameter.data = parameter.data.float()
    wide = glora.apply(nn.Linear(48, 40), config=config)
    wide.load_state_dict({k: v.float() for k, v in layer.state_dict().items()})
    wanted = run(wide, x, "whole")
    with torch.autocast("cpu", half) if autocast else contextlib.nullcontext():
        found = run(layer, x if autocast else x.detach().to(half).requires_grad_(), None)
    assert found[0].dtype == half
    for a, b in zip(found, wanted, strict=True):
        assert (a.float() - b).norm() <= 0.03 * b.norm()


def one(config: glora.GLoRAConfig, count: int = 1, dtype: torch.dtype = torch.float32) -> nn.Module:
    layer: nn.Module = nn.Linear(1024, 1024, dtype=dtype)
    for i in range(count):
        glora.apply(layer, config=config, name=f"a{i}")
    return glora.activate(layer, {f"a{i}": 1.0 for i in range(count)})


def forms(**given: Any) -> glora.GLoRAConfig:
    return glora.GLoRAConfig(**{**dict.fromkeys(FORMS, "none"), **given})


N = 2048
BUDGET = [
    *[(forms(A="lora", B=B), 1, None, 3.06, 0.05) for B in FORMS["B"]],
    *[(forms(A="none", B=B), 1, None, 2.10, 0.05) for B in FORMS["B"] if B != "none"],
    *[(forms(A=A, B=B), 1, None, 2.10, N / 1024 + 0.05) for A in ("vector", "constant") for B in FORMS["B"]],
    (forms(A="lora", product="matmul"), 1, None, 2.12, 0.10),
    (forms(A="lora", B="lora"), 4, None, 3.3, 0.10),
    *[
        (forms(A="lora", C=C, D="vector", E="vector"), 1, half, 4.1, 0.05)
        for half in ("bf16", "fp16", "autocast")
        for C in FORMS["C"]
    ],
]


@pytest.mark.parametrize(("config", "count", "half", "units", "share"), BUDGET)
def test_a_training_step_costs_what_was_promised(
    config: glora.GLoRAConfig, count: int, half: str | None, units: float, share: float
) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(half or "", torch.float32)
    layer = one(config, count, dtype)
    x = torch.randn(N, 1024, dtype=dtype, requires_grad=True)
    autocast = torch.autocast("cpu", torch.bfloat16) if half == "autocast" else contextlib.nullcontext()
    with count_products() as products:
        with count_saved([x, *layer.parameters()]) as saved, autocast:
            y = layer(x)
        torch.autograd.grad(y, [x, *factors_of(layer)], torch.ones_like(y))
    W0 = 1024 * 1024 * layer.weight.element_size()
    assert products.flops / (2 * N * 1024 * 1024) <= units
    assert saved.bytes / W0 <= share


def test_the_counters_see_what_they_should() -> None:
    x, W = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    with count_products() as count:
        y = F.linear(x, W)
        torch.autograd.grad(y.sum(), x)
        torch.zeros(4, 5).addmm_(x.detach(), W.T)
        torch.einsum("ni,oi->no", x.detach(), W)
        torch.mv(W, x[0].detach())
    assert (count.calls, count.flops) == (5, 4 * 2 * 4 * 3 * 5 + 2 * 3 * 5)


def test_what_is_not_a_lone_frozen_linear_takes_the_whole_way() -> None:
    layer = glora.apply(nn.Linear(6, 5), config=glora.GLoRAConfig(init="random"), freeze=False)
    x = torch.randn(3, 6)
    layer(x).sum().backward()
    assert layer.parametrizations.weight.original.grad is not None


@settings(max_examples=30)
@given(cases(dtypes=[torch.float64], max_size=(4, 3), max_adapters=2), st.sampled_from(["factored", "blocks"]))
def test_double_backward(case: Case, way: str) -> None:
    layer, x = case.build(), case.input(3).requires_grad_()
    values = factors_of(layer)

    def function(*tensors: Tensor) -> Tensor:
        return layer(tensors[0])

    with glora.ways.force(way):
        assert torch.autograd.gradcheck(function, (x, *values))
        assert torch.autograd.gradgradcheck(function, (x, *values))


def test_double_backward_through_a_layer_used_twice() -> None:
    layer = glora.apply(nn.Linear(3, 3, dtype=torch.float64), config=glora.GLoRAConfig(rank=2, init="random"))
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(layer(x)), (x, *factors_of(layer)))


CONFIGS = {
    "lora": glora.GLoRAConfig(init="random", rank=2),
    "factored": glora.GLoRAConfig(A="vector", init="random", rank=2),
    "matmul": glora.GLoRAConfig(product="matmul", init="random", rank=2),
    "matmul vector": glora.GLoRAConfig(A="vector", product="matmul", init="random"),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("way", [None, "whole"])
def test_compiled_without_a_break_and_equal(name: str, way: Any) -> None:
    torch._dynamo.reset()
    layer = glora.apply(nn.Linear(6, 5), config=CONFIGS[name])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for grad in (True, False):
        x = torch.randn(7, 6, requires_grad=True)
        for a, b in zip(run(compiled, x, way, grad), run(layer, x, way, grad), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_checkpointing_gives_equal_gradients_also_with_rank_dropout(name: str, p: float) -> None:
    forms_of = {**CONFIGS[name].forms, "product": CONFIGS[name].product}
    layer = glora.apply(nn.Linear(6, 5), config=glora.GLoRAConfig(**forms_of, init="random", rank=4, rank_dropout=p))
    x = torch.randn(7, 6, requires_grad=True)
    grads = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(call(x).square().sum(), [x, *factors_of(layer)]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_torch_func_transforms(name: str) -> None:
    layer, x = glora.apply(nn.Linear(6, 5, dtype=torch.float64), config=CONFIGS[name]), torch.randn(3, 6).double()
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    jacobian = torch.func.vmap(torch.func.jacrev(layer))(x)
    torch.testing.assert_close(jacobian, layer.weight.expand(3, -1, -1))
    tangent = torch.func.jvp(layer, (x,), (x,))[1]
    torch.testing.assert_close(tangent, x @ layer.weight.T)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent, x @ layer.weight.T)


@pytest.mark.parametrize("name", CONFIGS)
def test_odd_strides(name: str) -> None:
    layer = glora.apply(nn.Linear(6, 5), config=CONFIGS[name])
    base = torch.randn(12, 4, 8)
    for x in (base.transpose(0, 2)[1:7].permute(2, 1, 0), base[:, :, ::2].repeat(1, 1, 2)[..., 1:7], base[:, ::2, 2:]):
        contiguous = x.contiguous()
        torch.testing.assert_close(layer(x), layer(contiguous))
    weight = nn.Linear(5, 6).weight.T  # a weight that is not contiguous
    plain = nn.Linear(6, 5)
    plain.weight = nn.Parameter(weight.detach())
    layer = glora.apply(plain, config=CONFIGS[name])
    x = torch.randn(4, 6, requires_grad=True)
    for a, b in zip(run(layer, x, None), run(layer, x, "whole"), strict=True):
        torch.testing.assert_close(a, b)


def test_a_wrong_input_raises_as_a_plain_layer_does() -> None:
    for config in CONFIGS.values():
        layer, plain = glora.apply(nn.Linear(6, 5), config=config), nn.Linear(6, 5)
        for x in (torch.randn(4, 3), torch.randn(2, 12), torch.randn(3, 6).double()):
            with pytest.raises(RuntimeError) as wanted:
                plain(x)
            with pytest.raises(RuntimeError) as found:
                layer(x)
            assert type(found.value) is type(wanted.value)


@pytest.mark.parametrize("mode", ["bf16", "fp16", "autocast"])
@pytest.mark.parametrize("name", ["lora", "B", "vector", "matmul"])
@pytest.mark.parametrize(("size", "bound"), [(0.01, 0.05), (0.003, 0.12)])
def test_a_small_update_survives_half_precision(mode: str, name: str, size: float, bound: float) -> None:
    # Invariant 7: the update that acts, by least squares from the change of the outputs, against the true one.
    config = {
        "lora": forms(A="lora", init="random"),
        "B": forms(B="lora", init="random"),
        "vector": forms(A="vector", init="random"),
        "matmul": forms(A="lora", product="matmul", init="random"),
    }[name]
    half = torch.float16 if mode == "fp16" else torch.bfloat16
    layer = nn.Linear(256, 256, bias=False, dtype=torch.float32 if mode == "autocast" else half)
    glora.apply(layer, config=config)
    W0 = layer.parametrizations.weight.original.float()

    def true_update() -> Tensor:
        tensors = glora.state_dict(layer)
        scale = tensors.get("A.value", torch.zeros(256, 1)).expand(256, 256)
        if "A.left" in tensors:
            scale = tensors["A.left"] @ tensors["A.right"]
        shift = tensors["B.left"] @ tensors["B.right"] if "B.left" in tensors else torch.zeros(256, 256)
        return (W0 @ scale if config.product == "matmul" else W0 * scale) + shift

    with torch.no_grad():
        first = next(glora.parameters(layer))
        first.mul_(size * W0.norm() / true_update().norm())
        x = torch.randn(32768, 256).to(half)
        with torch.autocast("cpu", half) if mode == "autocast" else contextlib.nullcontext():
            y = torch.cat([layer(part) for part in x.split(4096)])
            with glora.disabled(layer):
                base = torch.cat([layer(part) for part in x.split(4096)])
        dW = true_update()
        estimate = torch.linalg.lstsq(x.float(), y.float() - base.float()).solution.T
        # The share of the true update that is there.
        share = (estimate * dW).sum() / dW.square().sum()
    assert abs(share - 1) <= bound


def test_four_adapters_of_all_kinds_share_one_pass() -> None:
    layer: nn.Module = nn.Linear(9, 7, dtype=torch.float64)
    for i, config in enumerate(CONFIGS.values()):
        silent_apply(layer, config=config, name=f"a{i}")
    glora.activate(layer, {f"a{i}": 0.5 + i for i in range(4)})
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    for a, b in zip(run(layer, x, None), run(layer, x, "whole"), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad(), glora.ways.force("few"):
        few = layer(x)
    torch.testing.assert_close(few, layer(x))


def test_the_choice_goes_by_the_forms_the_tokens_and_the_gradient() -> None:
    def chosen(config: glora.GLoRAConfig, tokens: int, grad: bool) -> str:
        layer = glora.apply(nn.Linear(8, 8), config=config)
        return glora.ways.choose(layer.parametrizations.weight[0].updates(False), tokens, grad)

    low = forms(A="lora", rank=3)
    assert chosen(low, 1, True) == "blocks"
    assert chosen(low, 1, False) == "few"
    assert chosen(low, 10_000, False) == "blocks"
    assert chosen(forms(A="lora", product="matmul"), 10_000, True) == "factored"
    assert chosen(forms(A="vector", B="lora"), 1, False) == "factored"
    with glora.ways.force("whole"):
        assert chosen(low, 1, False) == "whole"
