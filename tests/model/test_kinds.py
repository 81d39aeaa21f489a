"""Every kind of matrix: the formula, removal, files and gradients hold as in a linear layer."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import glora
from glora import GLoRAConfig
from tests.helpers import reference
from tests.helpers.kinds import KINDS, Kind
from tests.helpers.state import same_outputs
from tests.helpers.strategies import DTYPES, configs


def attached(kind: Kind, config: GLoRAConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = kind.build().to(dtype)
    return glora.apply(model, [kind.path], config if kind.bias else replace(config, C="none", D="none", E="none"))


def expected(kind: Kind, W0: Tensor, b0: Tensor | None, config: GLoRAConfig, given: dict[str, Tensor]) -> Any:
    """W' and b' by the loops of the reference, matrix by matrix, in the tensor's own layout."""

    def path(name: str, at: tuple[int, ...]) -> Any:
        if f"{kind.path}.{name}.left" in given:
            balance = given.get(f"{kind.path}.{name}.balance")
            scale = (1.0 if config.alpha is None else config.alpha / config.rank) * (
                1 if balance is None else balance[at]
            )
            return given[f"{kind.path}.{name}.left"][at] * scale, given[f"{kind.path}.{name}.right"][at]
        value = given.get(f"{kind.path}.{name}.value")
        return None if value is None else value[at].detach()

    def tensor(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.flatten() if value.numel() == 1 else value

    weight, bias = torch.empty_like(W0), None if b0 is None else torch.empty_like(b0)
    for at in kind.batch(W0):
        matrix = kind.matrix(W0, at)
        A, B = (tensor(p) if isinstance(p, Tensor) else p for p in (path("A", at), path("B", at)))
        kind.put(weight, at, reference.weight(matrix, [(1.0, A, B, config.product)]).to(W0.dtype))
        if b0 is not None and bias is not None:
            C, D, E = path("C", at), path("D", at), path("E", at)
            bias[at] = reference.bias(matrix, b0[at], [(1.0, C, tensor(D), tensor(E))]).to(b0.dtype)
    return weight, bias


@pytest.mark.parametrize("kind", KINDS, ids=str)
@given(config=configs(needs="AB"))
def test_each_matrix_is_the_formula_and_removal_gives_the_very_bits(kind: Kind, config: GLoRAConfig) -> None:
    model = attached(kind, config)
    module = kind.module(model)
    store = module.parametrizations
    W0 = (store[kind.weight].original if kind.weight in store else getattr(module, kind.weight)).clone()
    has_bias = kind.bias is not None and getattr(module, kind.bias) is not None
    b0 = None
    if has_bias:
        b0 = (store[kind.bias].original if kind.bias in store else getattr(module, kind.bias)).clone()
    weight, bias = expected(kind, W0, b0, config, glora.state_dict(model))
    assert torch.allclose(getattr(module, kind.weight), weight, rtol=1e-9, atol=1e-11)
    assert getattr(module, kind.weight).stride() == W0.stride()
    if bias is not None:
        assert torch.allclose(getattr(module, kind.bias), bias, rtol=1e-9, atol=1e-11)
    assert_lifecycle(model, kind, W0, b0)


def assert_lifecycle(model: nn.Module, kind: Kind, W0: Tensor, b0: Tensor | None) -> None:
    x = kind.input().to(W0.dtype)
    y = kind.call(model, x)
    for order in ((kind.weight, kind.bias), (kind.bias, kind.weight)):
        copied = copy.deepcopy(model)
        module = kind.module(copied)
        for name in order:
            if name is not None and parametrize.is_parametrized(module, name):
                parametrize.remove_parametrizations(module, name)
        assert torch.allclose(kind.call(copied, x), y, rtol=1e-9, atol=1e-11)
    with glora.merged(model):
        assert torch.allclose(kind.call(model, x), y, rtol=1e-9, atol=1e-11)
    merged = glora.merge(copy.deepcopy(model))
    assert torch.allclose(kind.call(merged, x), y, rtol=1e-9, atol=1e-11)
    glora.remove(model)
    module = kind.module(model)
    assert torch.equal(getattr(module, kind.weight), W0)
    assert b0 is None or torch.equal(getattr(module, kind.bias), b0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_a_start_is_the_base_model_or_moves_it(kind: Kind, dtype: torch.dtype, product: Any) -> None:
    for init in ("identity", "random"):
        torch.manual_seed(0)
        model = kind.build().to(dtype)
        before = getattr(kind.module(model), kind.weight).clone()
        glora.apply(model, [kind.path], GLoRAConfig.glora(C="none", D="none", E="none", product=product, init=init))
        after = getattr(kind.module(model), kind.weight)
        assert after.dtype == dtype
        assert torch.equal(after, before) == (init == "identity")
        if init == "random":
            moved = (after - before).double().norm() / before.double().norm()
            assert 0.03 < moved < 0.4


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_factor_has_the_gradient_of_the_dense_formula(kind: Kind) -> None:
    model = attached(kind, GLoRAConfig.glora(init="random", rank=2))
    x = kind.input()
    kind.call(model, x).square().sum().backward()
    grads = {key: parameter.grad for key, parameter in glora.named_parameters(model)}
    eps = 1e-6
    for key, parameter in glora.named_parameters(model):
        grad = grads[key]
        assert grad is not None, key
        with torch.no_grad():
            direction = torch.randn_like(parameter)
            ends: list[Tensor] = []
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * eps)
                ends.append(kind.call(model, x).square().sum())
                parameter.add_(direction, alpha=-sign * eps)
        slope = (ends[0] - ends[1]) / (2 * eps)
        assert torch.allclose(slope, (grad * direction).sum(), rtol=1e-5, atol=1e-6), key


@pytest.mark.parametrize("kind", KINDS, ids=str)
@given(config=configs(needs="AB"))
def test_a_file_and_a_checkpoint_carry_every_kind(kind: Kind, config: GLoRAConfig, tmp_path_factory: Any) -> None:
    from safetensors.torch import load_file, save_file

    from glora.files.adapter import read
    from glora.files.checkpoint import merge_checkpoint

    folder: Path = tmp_path_factory.mktemp("kind")
    model = attached(kind, config, torch.float32)
    torch.manual_seed(0)
    base = kind.build()
    save_file(base.state_dict(), folder / "base.safetensors")
    glora.save(model, folder)
    loaded = glora.load(copy.deepcopy(base), folder)
    x = kind.input().float()
    assert same_outputs(kind.call(loaded, x), kind.call(model, x))
    adapter = read(folder / "adapter_model.safetensors")
    merge_checkpoint(folder / "base.safetensors", adapter, folder, folder / "out.safetensors")
    merged = glora.merge(model).state_dict()
    found = load_file(folder / "out.safetensors")
    assert found.keys() == merged.keys()
    assert all(torch.equal(found[key], merged[key]) for key in merged)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_plain_checkpoint_loads_while_a_kind_is_adapted(kind: Kind) -> None:
    model = attached(kind, GLoRAConfig.glora(init="random"))
    torch.manual_seed(1)
    other = kind.build().double()
    model.load_state_dict(other.state_dict())
    assert all(torch.equal(glora.base_state_dict(model)[key], value) for key, value in other.state_dict().items())
    glora.remove(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in other.state_dict().items())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_two_adapters_add_up_and_switch(kind: Kind) -> None:
    model = attached(kind, GLoRAConfig.glora(init="random"))
    config = GLoRAConfig.lora(init="random", rank=3)
    glora.apply(model, [kind.path], config, name="b")
    glora.activate(model, "default")
    module = kind.module(model)
    W0 = module.parametrizations[kind.weight].original
    first = getattr(module, kind.weight) - W0
    glora.activate(model, "b")
    second = getattr(module, kind.weight) - W0
    glora.activate(model, {"default": 0.5, "b": -2.0})
    assert torch.allclose(getattr(module, kind.weight), W0 + 0.5 * first - 2 * second, atol=1e-9)
    glora.delete(model, "b")
    glora.activate(model, "default")
    assert torch.allclose(getattr(module, kind.weight), W0 + first, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.swept], ids=str)
def test_convolutions_are_reached_by_name_alone(kind: Kind) -> None:
    model = nn.Sequential(kind.build(), nn.Linear(2, 2))
    warned = _small(model) and not isinstance(model[0][0], nn.Embedding)  # which coverage does not count
    with pytest.warns(UserWarning, match=r"reaches \d+% of .* not reached: .*Conv") if warned else nullcontext():
        glora.apply(model, config=glora.GLoRAConfig.glora())
    assert {key.split(".")[0] for key in glora.state_dict(model)} == {"1"}


def _small(model: nn.Module) -> bool:
    sizes = [p.numel() for p in model.parameters() if p.ndim > 1]
    return sizes[-1] < sum(sizes) / 2


@given(st.sampled_from(KINDS), st.sampled_from(["list", "regex", "predicate", "mapping"]))
def test_every_kind_is_reached_when_it_is_named(kind: Kind, how: str) -> None:
    config = GLoRAConfig.lora()
    ways: dict[str, Any] = {
        "list": [kind.path.rpartition(".")[2] or kind.path],
        "regex": ".*" + kind.path,
        "predicate": lambda path, _module: path == kind.path,
        "mapping": {kind.path: config},
    }
    model = glora.apply(kind.build(), ways[how], None if how == "mapping" else config)
    assert set(glora.state_dict(model)) == {f"{kind.path}.B.left", f"{kind.path}.B.right"}


def test_all_linear_reaches_conv1d_attention_and_experts() -> None:
    for kind in KINDS:
        if kind.swept:
            reached = {layer.path for layer in glora.plan(kind.build(), config=glora.GLoRAConfig.glora()).layers}
            assert kind.path in reached


def test_an_embedding_is_refused_with_a_word_on_why() -> None:
    model = nn.Sequential(nn.EmbeddingBag(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"'0' matches none .* only EmbeddingBag .*looks rows up.*trainable="):
        glora.apply(model, ["0"], config=glora.GLoRAConfig.glora())
