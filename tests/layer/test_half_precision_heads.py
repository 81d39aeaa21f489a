"""Heads on half-precision bases: their copies are float32, and their modules read them in the base's dtype."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glora
from glora.layer.heads import HeadCopy
from tests.helpers.calls import LORA, RANDOM
from tests.helpers.state import clones, same

HALF = [torch.bfloat16, torch.float16]


class Reads(nn.Module):
    """Reads its weight many times in a call, as experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return sum([x @ self.weight for _ in range(5)], torch.zeros_like(x))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class Convolves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.T).T


KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "norm": lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "convolution": Convolves,
    "attention": Attends,
    "own": Reads,
}


def build(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), KINDS[kind]()).to(dtype)


def step(model: nn.Module, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """A step of training at a small rate: each number of the heads before and after."""
    optimizer = torch.optim.AdamW(glora.parameters(model), lr=1e-5, weight_decay=0.0)
    before = {key: p.detach().clone() for key, p in glora.named_parameters(model) if key.startswith("2")}
    y = model(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).to(dtype))
    assert y.dtype == dtype
    (y.float() - 1).pow(3).mean().backward()
    optimizer.step()
    return {key: (before[key], p) for key, p in glora.named_parameters(model) if key.startswith("2")}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_that_has_a_gradient_moves_as_in_float32(kind: str, dtype: torch.dtype) -> None:
    model = glora.apply(build(kind, dtype), ["0"], LORA, trainable=["2"])
    for key, (before, after) in step(model, dtype).items():
        assert after.dtype == torch.float32
        assert after.grad is not None
        assert after.grad.dtype == torch.float32
        assert torch.equal(before != after, after.grad != 0), key
        # A step of Adam's: the rate, whatever the gradient.
        moved = (after - before).abs()[after.grad.abs() > 1e-4]
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-5), rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_all_its_life_long(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    plain, x = build(kind, dtype).eval(), torch.randn(6, 4).to(dtype)
    model, base = copy.deepcopy(plain), clones(plain.state_dict())
    glora.apply(model, ["0"], LORA, trainable=["2"])
    with torch.no_grad():
        for parameter in glora.parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    y = model[2](x)
    assert same(glora.base_state_dict(model), base)
    with glora.disabled(model):
        assert torch.equal(model[2](x), plain[2](x))
    with glora.merged(model):
        assert all(p.dtype == dtype for p in model[2].parameters())
        assert torch.equal(model[2](x), y)
    replica = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in glora.parameters(model):
            parameter.add_(1)
    assert torch.equal(replica[2](x), y)
    glora.save(replica, tmp_path)
    loaded = glora.load(copy.deepcopy(plain), tmp_path, strict=True)
    assert same(glora.state_dict(loaded), glora.state_dict(replica))
    assert torch.equal(loaded[2](x), y)
    # The whole model's state dict too.
    again = glora.apply(copy.deepcopy(plain), ["0"], LORA, trainable=["2"])
    again.load_state_dict(replica.state_dict())
    assert torch.equal(again[2](x), y)
    glora.merge(replica)
    assert {key: value.dtype for key, value in replica.state_dict().items()} == {k: v.dtype for k, v in base.items()}
    assert torch.equal(replica[2](x), y)
    glora.remove(model)
    assert same(model.state_dict(), base)


@pytest.mark.parametrize("dtype", HALF)
def test_a_file_with_a_head_in_half_precision_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    model = glora.apply(build("linear", dtype), ["0"], RANDOM, trainable=["2"])
    older = copy.deepcopy(model)
    for module in older.modules():
        if isinstance(module, HeadCopy):
            module.to(dtype)
    glora.save(older, tmp_path)
    loaded = glora.load(build("linear", dtype), tmp_path)
    assert same(glora.state_dict(loaded), glora.state_dict(model))
    assert same(glora.state_dict(glora.load_state_dict(model, glora.state_dict(older))), glora.state_dict(loaded))


def test_float16_trains_with_a_gradient_scaler() -> None:
    model = glora.apply(build("norm", torch.float16), ["0"], LORA, trainable=["2"])
    optimizer, scaler = torch.optim.AdamW(glora.parameters(model), lr=1e-3), torch.amp.GradScaler("cpu")
    before = clones(glora.state_dict(model))
    scaler.scale(model(torch.randn(8, 4).half()).float().square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() >= 2.0**15
    assert not same(glora.state_dict(model), before)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.out = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.body(self.embed(tokens)))


@pytest.mark.parametrize("dtype", HALF)
def test_a_tied_head_is_read_alike_in_both_places(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, plain = torch.arange(5), Tied().to(dtype)
    model, wide = copy.deepcopy(plain), copy.deepcopy(plain).float()
    for each in (model, wide):
        glora.apply(each, ["body"], LORA, trainable=["embed"])
        each(tokens).float().square().mean().backward()
    (weight,) = [p for key, p in glora.named_parameters(model) if key == "embed.weight"]
    (known,) = [p for key, p in glora.named_parameters(wide) if key == "embed.weight"]
    assert weight.grad is not None
    assert known.grad is not None
    assert (weight.grad - known.grad).norm() < 0.03 * known.grad.norm()  # of both places
    assert torch.equal(model.out.weight, model.embed.weight)
    read = model.out.weight.detach()
    glora.merge(model)
    assert model.out.weight is model.embed.weight
    assert torch.equal(model.out.weight, read)


def test_what_has_no_finite_number_in_the_bases_dtype_is_not_merged() -> None:
    model = glora.apply(build("linear", torch.float16), ["0"], LORA, trainable=["2"])
    with torch.no_grad():
        dict(glora.named_parameters(model))["2.bias"][1] = 1e6
    before, kinds = clones(model.state_dict()), [type(module) for module in model.modules()]
    for call in (glora.merge, lambda m: glora.merged(m).__enter__()):
        with pytest.raises(ValueError, match=r"must be finite; `bias` of '2' has 1 entries in torch.float16"):
            call(model)
        assert same(model.state_dict(), before)
        assert [type(module) for module in model.modules()] == kinds


def test_equal_heads_act_together_with_one_that_is_not_there() -> None:
    model = build("linear", torch.bfloat16)
    glora.apply(model, ["0"], RANDOM, trainable=["2"], name="a")
    glora.apply(model, ["0"], RANDOM, name="b")
    glora.activate(model, {"a": 1.0, "b": 1.0})  # a's head is the base's still
    glora.activate(model, "a")
    with torch.no_grad():
        dict(glora.named_parameters(model, "a"))["2.bias"].add_(1e-6)  # which bfloat16 would not see
    with pytest.raises(ValueError, match="Heads do not add up"):
        glora.activate(model, {"a": 1.0, "b": 1.0})


def test_what_moves_while_merged_keeps_the_dtype_of_factors_and_heads() -> None:
    model = glora.apply(build("linear", torch.bfloat16), ["0"], LORA, trainable=["2"])
    with glora.merged(model):
        model.to("meta")
    assert {(tensor.dtype, tensor.device.type) for tensor in glora.state_dict(model).values()} == {
        (torch.float32, "meta")
    }


def test_a_head_is_rounded_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = glora.apply(build("own", torch.bfloat16), ["0"], LORA, trainable=["2"])
    reads: list[torch.dtype] = []
    read = HeadCopy.read

    def count(self: HeadCopy, dtype: torch.dtype) -> Tensor:
        reads.append(dtype)
        return read(self, dtype)

    monkeypatch.setattr(HeadCopy, "read", count)
    model(torch.randn(3, 4).bfloat16())
    assert reads == [torch.bfloat16]


def test_a_wide_head_is_its_copy_itself() -> None:
    model = glora.apply(build("linear", torch.float32), ["0"], LORA, trainable=["2"])
    assert model[2].weight is dict(glora.named_parameters(model))["2.weight"]


def test_a_compiled_model_computes_the_same() -> None:
    model: Any = glora.apply(build("norm", torch.bfloat16), ["0"], LORA, trainable=["2"])
    x = torch.randn(3, 4).bfloat16()
    y = model(x)
    y.float().sum().backward()
    gradients = {key: p.grad for key, p in glora.named_parameters(model)}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, y, rtol=2**-6, atol=2**-6)
    compiled.float().sum().backward()
    for key, parameter in glora.named_parameters(model):
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=2**-5, atol=math.sqrt(2**-9))
