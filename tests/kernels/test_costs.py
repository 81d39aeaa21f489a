"""A training step costs what was promised: matrix products and saved bytes, counted."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import glora
from tests.helpers import internals
from tests.helpers.calls import FORMS, attach, factors_of, only
from tests.helpers.counting import count_passes, count_products, count_saved
from tests.helpers.marks import long


def one(config: glora.GLoRAConfig, count: int = 1, dtype: torch.dtype = torch.float32) -> nn.Module:
    layer: nn.Module = nn.Linear(1024, 1024, dtype=dtype)
    for i in range(count):
        glora.apply(layer, config=config, name=f"a{i}")
    return glora.activate(layer, {f"a{i}": 1.0 for i in range(count)})


N = 2048


BUDGET = [
    *[(only(A="lora", B=B), 1, None, 3.06, 0.05) for B in FORMS["B"]],
    *[(only(A="none", B=B), 1, None, 2.10, 0.05) for B in FORMS["B"] if B != "none"],
    *[(only(A=A, B=B), 1, None, 2.10, N / 1024 + 0.05) for A in ("vector", "constant") for B in FORMS["B"]],
    (only(A="lora", product="matmul"), 1, None, 2.12, 0.10),
    (only(A="lora", B="lora"), 4, None, 3.3, 0.15),
    # A product of half precision takes a processor seconds: it is counted, but not in the plain command.
    *[
        long(only(A="lora", C=C, D="vector", E="vector"), 1, half, 4.1, 0.05)
        for half in ("bf16", "fp16", "autocast")
        for C in FORMS["C"]
    ],
    # As on a processor that has no units for it.
    *[(only(A="lora", C="lora"), 1, f"{half}, loops", 3.1, 0.05) for half in ("bf16", "fp16", "autocast")],
]
# In bfloat16 what A needs is kept in bfloat16, where it is one Function (Note [One Function]); under autocast
# x in bfloat16 too, which is not the caller's x.
SCALED = only(A="vector", B="lora", C="vector", D="vector", E="vector")
FIVE = glora.GLoRAConfig.glora()
NARROW: list[Any] = [
    *[(SCALED, 1, half, 2.10, N / 1024 + 0.05) for half in ("bf16", "autocast", "bf16, loops", "autocast, loops")],
    *[(only(B="lora"), 1, half, 2.10, 0.05 + share) for half, share in (("bf16, loops", 0), ("autocast, loops", 1))],
]


def dtype_of(half: str | None) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get((half or "").partition(",")[0], torch.float32)


def units_of(half: str | None) -> contextlib.AbstractContextManager[Any]:
    return internals.half_units("loops" not in (half or ""))


def autocast_of(half: str | None) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, enabled="autocast" in (half or ""))


@pytest.mark.parametrize(("config", "count", "half", "units", "share"), BUDGET + NARROW)
def test_a_training_step_costs_what_was_promised(
    config: glora.GLoRAConfig, count: int, half: str | None, units: float, share: float
) -> None:
    layer = one(config, count, dtype_of(half))
    x = torch.randn(N, 1024, dtype=dtype_of(half), requires_grad=True)
    with units_of(half), count_products() as products:
        with count_saved([x, *layer.parameters()]) as saved, autocast_of(half):
            y = layer(x)
        torch.autograd.grad(y, [x, *factors_of(layer)], torch.ones_like(y))
    W0 = 1024 * 1024 * layer.weight.element_size()
    assert products.flops / (2 * N * 1024 * 1024) <= units
    assert saved.bytes / W0 <= share


@pytest.mark.parametrize("half", ["bf16", "fp16", "autocast"])
@pytest.mark.parametrize("config", [only(B="lora"), SCALED, only(B="lora", A="lora", product="matmul"), FIVE])
def test_without_units_for_half_precision_only_thin_products_are_narrow(config: glora.GLoRAConfig, half: str) -> None:
    layer, x = one(config, dtype=dtype_of(half)), torch.randn(64, 1024, dtype=dtype_of(half), requires_grad=True)
    with internals.half_units(False), count_products() as products:
        with autocast_of(half):
            y = layer(x)
        torch.autograd.grad(y, [x, *factors_of(layer)], torch.ones_like(y))
        with torch.no_grad(), autocast_of(half):
            layer(x)
    assert products.flops >= 3 * 2 * x.numel() * 1024
    assert products.narrow <= 0.05 * products.flops


@pytest.mark.parametrize(("config", "count", "half", "units", "share"), BUDGET)
def test_a_compiled_training_step_costs_the_same(
    config: glora.GLoRAConfig, count: int, half: str | None, units: float, share: float
) -> None:
    torch._dynamo.reset()
    layer, products = one(config, count, dtype_of(half)), count_products()
    x = torch.randn(N, 1024, dtype=dtype_of(half), requires_grad=True)

    # No mode may be on around a compiled function: the products are counted in what is compiled.
    def compile_counting(graph: torch.fx.GraphModule, _: object) -> Any:
        def run(given: list[Any]) -> Any:
            with products:
                return graph(*given)

        run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
        return run

    backend = aot_autograd(
        fw_compiler=compile_counting,
        partition_fn=min_cut_rematerialization_partition,
        keep_inference_input_mutations=True,
    )
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    with units_of(half), internals.inside_operators(products):
        with count_saved([x, *layer.parameters()]) as saved, autocast_of(half):
            y = compiled(x)
        torch.autograd.grad(y, [x, *factors_of(layer)], torch.ones_like(y))
    assert 1.9 <= products.flops / (2 * N * 1024 * 1024) <= units
    assert saved.bytes / (1024 * 1024 * layer.weight.element_size()) <= share


# Bytes of the outputs' size that are read or written, forward and backward, in outputs. Forward: the product writes 1,
# the thin product of all B reads and writes (2), a scale does (2; beside a low-rank B with the bias in it, else the
# bias is 2 more). Backward reads each gradient: for x (1), for both factors of B (2), for a trained bias (1); a scale's
# is 4 more, with what it sums up. In bfloat16 the bias comes last (2).
OUTPUTS = [
    (only(E="vector"), 1, torch.float32, 1, 2),
    (only(B="lora"), 1, torch.float32, 3, 3),
    (only(B="lora"), 3, torch.float32, 3, 3),
    (only(B="lora", C="vector", D="vector", E="vector"), 1, torch.float32, 3, 4),
    (only(A="lora", B="lora", product="matmul"), 1, torch.float32, 3, 3),
    (only(A="vector", B="lora", product="matmul", E="vector"), 1, torch.float32, 3, 4),
    (only(A="vector"), 1, torch.float32, 5, 7),
    (only(A="vector", B="lora", C="vector", D="vector", E="vector"), 1, torch.float32, 5, 10),
    (only(A="constant", B="vector", E="vector"), 1, torch.float32, 7, 10),
    (only(B="lora"), 1, torch.bfloat16, 5, 3),
    (only(A="vector", B="lora", E="vector"), 1, torch.bfloat16, 16, 12),
]
# The same of the inputs' size. Both products read x (2); backward x is read for B's right factor (1), and its gradient
# is the product with W0 (1) to which B's is added in place (2).
INPUTS = [
    (only(E="vector"), 1, torch.float32, 1, 1),
    (only(B="lora"), 1, torch.float32, 2, 4),
    (only(B="lora"), 3, torch.float32, 2, 4),
    (only(A="vector", B="lora", C="vector", D="vector", E="vector"), 1, torch.float32, 2, 4),
    (only(A="lora", B="lora", product="matmul"), 1, torch.float32, 2, 4),
]


@pytest.mark.parametrize(
    ("side", "config", "count", "dtype", "forward", "backward"),
    [("outputs", *case) for case in OUTPUTS] + [("inputs", *case) for case in INPUTS],
)
def test_a_factored_form_passes_over_activations_no_more_than_it_must(
    side: str, config: glora.GLoRAConfig, count: int, dtype: torch.dtype, forward: int, backward: int
) -> None:
    in_features, out_features = (64, 1024) if side == "outputs" else (1024, 64)  # one is larger than all else
    layer: nn.Module = nn.Linear(in_features, out_features, dtype=dtype)
    for i in range(count):
        attach(layer, config, name=f"a{i}")
    glora.activate(layer, {f"a{i}": 1.0 for i in range(count)})
    x = torch.randn(512, in_features, dtype=dtype, requires_grad=True)
    with internals.half_units(True), count_passes(512 * 1024) as there:
        y = layer(x)
    g = torch.ones_like(y)
    with internals.half_units(True), count_passes(512 * 1024) as back:
        torch.autograd.grad(y, [x, *factors_of(layer)], g)
    one_pass = (y if side == "outputs" else x).nbytes
    assert there.bytes <= forward * one_pass
    assert back.bytes <= backward * one_pass


class count_casts(TorchDispatchMode):
    """Casts of one weight to bfloat16, and what is written of bfloat16 tensors of its size or more, in its size."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.casts, self.written = weight, 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_narrow = isinstance(result, Tensor) and result.dtype == torch.bfloat16
        if is_narrow and not func.is_view and "empty" not in func.name() and result.numel() >= self.weight.numel():
            read = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.casts += any(leaf.data_ptr() == self.weight.data_ptr() for leaf in read)
            self.written += result.numel() / self.weight.numel()
        return result


# Under autocast, forward and backward: how often W0 is made narrow, and tensors of its size that are written narrow. A
# frozen nn.Linear, and so PEFT's LoRA, keeps its narrow copy, half of W0's bytes. We keep none, and B alone makes it
# anew for the backward pass. W0 and B's factor are made one narrow matrix, in one pass. An elementwise A has the update
# beside it, W' and its gradient too.
CASTS: list[Any] = [
    (None, (1, 0), (1, 0), 0.51),
    (only(B="lora"), (1, 1), (1, 1), 0.05),
    (only(B="lora", C="vector", D="vector", E="vector"), (1, 1), (1, 1), 0.05),
    (only(A="vector", B="lora"), (1, 0), (1, 0), 0.10),
    (glora.GLoRAConfig.glora(), (1, 0), (2, 2), 0.05),
]


@pytest.mark.parametrize(("config", "casts", "written", "share"), CASTS)
def test_autocast_makes_w0_narrow_no_more_often_than_it_must(
    config: glora.GLoRAConfig | None, casts: tuple[int, int], written: tuple[int, int], share: float
) -> None:
    layer = nn.Linear(512, 512).requires_grad_(False)
    W0 = layer.weight
    if config is not None:
        glora.apply(layer, config=config)
    x = torch.randn(64, 512).bfloat16().requires_grad_()  # as after another layer; smaller than W0
    autocast = torch.autocast("cpu", torch.bfloat16)
    units = internals.half_units(True)
    with units, count_saved([x, *layer.parameters()]) as saved, count_casts(W0) as there, autocast:
        y = layer(x)
    with internals.half_units(True), count_casts(W0) as back:
        torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], torch.ones_like(y))
    assert (there.casts, back.casts) == casts
    assert (round(there.written, 1), round(back.written, 1)) == written
    assert saved.bytes / W0.nbytes <= share


def test_the_counters_see_what_they_should() -> None:
    x, W = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    with count_products() as count:
        y = F.linear(x, W)
        torch.autograd.grad(y.sum(), x)
        torch.zeros(4, 5).addmm_(x.detach(), W.T)
        torch.einsum("ni,oi->no", x.detach(), W)
        torch.mv(W, x[0].detach())
    assert (count.calls, count.flops) == (5, 4 * 2 * 4 * 3 * 5 + 2 * 3 * 5)


def test_a_pass_is_what_reads_or_writes() -> None:
    a, b = torch.ones(4, 3), torch.ones(4, 3)
    with count_passes(12) as count:
        a.add_(b)  # reads both and writes one
        a.view(3, 4).sum()  # a view is no pass; the sum reads one
        torch.mul(a, b, out=torch.empty(4, 3))  # reads both and writes one
    assert count.bytes == 7 * a.nbytes
