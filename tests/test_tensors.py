"""Tensors that are no plain ones: adapters over a quantised base, which stays as it is; whole tensors and parts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import glora
from glora import GLoRAConfig
from glora.fingerprint import fingerprint
from glora.tensors import dense, gathered, is_sharded, replicated_like, rows, sharded_like, storage_of, write_into
from tests.helpers import internals
from tests.helpers.calls import LORA, RANDOM, attach, refused, warned
from tests.helpers.quantised import (
    FORMS,
    Int8Rows,
    block,
    blocks_of,
    differences,
    most_floats,
    of_layers,
    quantise_rows,
)
from tests.helpers.state import unchanged


def quantised() -> nn.Sequential:
    model = block()
    quantise_rows(model)
    return model


# In one block of rows the kernel's own result is passed on, and in several it is put together.
blocks = pytest.mark.parametrize("rows", [10, 64])


@blocks
@pytest.mark.parametrize(("bias", "config"), of_layers(FORMS))
def test_every_form_equals_the_float_model_and_trains_as_it_does(bias: bool, config: GLoRAConfig, rows: int) -> None:
    assert max(differences(quantise_rows, config, bias=bias, rows=rows).values()) < 1e-4


@blocks
@pytest.mark.parametrize("units", [False, True], ids=["loops", "units"])
@pytest.mark.parametrize(("bias", "config"), of_layers(FORMS))
def test_in_half_precision_too(bias: bool, config: GLoRAConfig, units: bool, rows: int) -> None:
    with internals.half_units(units):
        assert max(differences(quantise_rows, config, torch.bfloat16, bias, rows).values()) < 0.05


@blocks
@pytest.mark.parametrize("config", [LORA, RANDOM, GLoRAConfig.glora(A="vector", init="random")])
def test_its_own_kernel_need_not_take_autocasts_dtype(config: GLoRAConfig, rows: int) -> None:
    model, x = attach(quantised(), config), torch.randn(3, 64)
    wanted = model(x)
    with torch.autocast("cpu", torch.bfloat16), blocks_of(rows):
        found = model(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_no_float_tensor_is_as_large_as_the_weight(form: str) -> None:
    config = FORMS[form]
    if config.A == config.B == "none":
        pytest.skip("the weight has no adapter: it is the base layer's own product")
    assert most_floats(quantise_rows, config, rows=16) <= 16 * 64
    assert most_floats(quantise_rows, config, rows=64) == 64 * 64  # in one block it is, and is seen


def test_the_backward_pass_keeps_no_float_copy() -> None:
    model, x = attach(quantised(), LORA), torch.randn(3, 64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(x)
    assert max(t.numel() for t in kept if type(t) is not Int8Rows) < 32 * 64


@pytest.mark.parametrize("preset", [GLoRAConfig.lora, GLoRAConfig.hira])
def test_a_second_derivative(preset: Any) -> None:
    model = attach(quantised(), preset(rank=1, init="random"))
    plain = glora.merge(copy.deepcopy(model), dequantize=True)
    x = torch.randn(3, 64, requires_grad=True)
    grads: list[Tensor] = []
    for each in (model, plain):
        (dx,) = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
        grads += torch.autograd.grad(dx.square().sum(), x)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_under_transforms_compiled_and_in_autocast() -> None:
    x = torch.randn(3, 64)
    for config in (LORA, RANDOM):
        model = attach(quantised(), config)
        torch.testing.assert_close(torch.vmap(model)(x), model(x), rtol=1e-5, atol=1e-6)
        jacobian = torch.func.jacrev(lambda x, model=model: model(x).sum(0))(x)
        (dx,) = torch.autograd.grad(model(given := x.clone().requires_grad_()).sum(), given)
        torch.testing.assert_close(jacobian.sum(0), dx, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), model(x), rtol=0.05, atol=0.05)
        half_input = model(x.bfloat16())  # which nn.Linear refuses, and quantised kernels need not
        torch.testing.assert_close(half_input.float(), model(x), rtol=0.05, atol=0.05)


def test_the_whole_life_of_an_adapter(tmp_path: Path) -> None:
    model = quantised()
    x, W0, flags = torch.randn(3, 64), model[0].weight, [p.requires_grad for p in model.parameters()]
    keys, before = list(model.state_dict()), model(x)
    pending = model(given := x.clone().requires_grad_())  # a graph that holds W0
    glora.apply(model, name="a", config=glora.GLoRAConfig.glora())
    pending.sum().backward()
    assert given.grad is not None
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    glora.apply(model, config=GLoRAConfig.glora(rank=2, init="random"), name="b")
    changed = model(x)
    assert not torch.allclose(changed, before, atol=1e-2)
    assert glora.plan(model, name="c", config=glora.GLoRAConfig.glora()).layers[0].path == "0"
    assert "A=lora" in str(glora.summary(model))
    assert torch.equal(copy.deepcopy(model)(x), changed)
    with glora.disabled(model):
        assert torch.equal(model(x), before)
        assert model[0].weight is W0
    with glora.route(model, ["b", None, "b"]):
        routed = model(x)
    torch.testing.assert_close(routed, torch.stack([changed[0], before[1], changed[2]]), rtol=1e-4, atol=1e-5)
    assert list(glora.base_state_dict(model)) == keys
    glora.save(model, tmp_path, name="b")
    other = quantised()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k in keys}, strict=False)
    for layer, source in ((0, model[0]), (2, model[2])):
        other[layer].weight = source.parametrizations.weight.original
        other[layer].bias.data = source.parametrizations.bias.original.data
    assert not warned(lambda: glora.load(other, tmp_path))
    assert torch.equal(other(x), changed)
    (message,) = warned(lambda: glora.load(quantised(), tmp_path))
    assert "trained beside others" in message
    glora.remove(model)
    assert (type(model[0]), list(model.state_dict())) == (nn.Linear, keys)
    assert model[0].weight is W0
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_weight_that_is_read_is_the_whole_w_prime() -> None:
    model = attach(quantised(), GLoRAConfig.lora(rank=2, alpha=2, init="random"))
    stack = model[0].parametrizations.weight
    B = stack[0].default.B
    torch.testing.assert_close(model[0].weight, stack.original.dequantize() + B.left @ B.right)


def test_a_merge_is_refused_unless_it_may_dequantise() -> None:
    model, x = attach(quantised()), torch.randn(3, 64)
    y, W0 = model(x), model[0].parametrizations.weight.original
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"'0' is quantised .Int8Rows.*Nothing was merged. Pass dequantize=True"),
    ):
        glora.merge(model)
    with (
        unchanged(model),
        pytest.raises(ValueError, match="need no merge; or glora.merge.copy.deepcopy"),
        glora.merged(model),
    ):
        pass
    merged = glora.merge(copy.deepcopy(model), dequantize=True)
    assert (type(merged[0]), type(merged[0].weight)) == (nn.Linear, nn.Parameter)
    torch.testing.assert_close(merged(x), y, rtol=1e-5, atol=1e-5)
    baked = copy.deepcopy(model)
    nn.utils.parametrize.remove_parametrizations(baked[0], "weight")
    torch.testing.assert_close(baked(x), y, rtol=1e-5, atol=1e-5)
    assert model[0].parametrizations.weight.original is W0


def test_a_merge_while_a_graph_holds_the_weight() -> None:
    model = attach(quantised(), LORA)
    loss = model(x := torch.randn(3, 64, requires_grad=True)).sum()
    glora.merge(model, dequantize=True)
    loss.backward()
    assert x.grad is not None


def test_a_route_of_forms_that_need_no_w_prime() -> None:
    model, x = quantised(), torch.randn(4, 64)
    for name in ("a", "b"):
        attach(model, GLoRAConfig.lora(rank=2, init="random"), name=name)
    expected: list[Tensor] = []
    for sample, name in zip(x, ("a", "b", None, "a"), strict=True):
        glora.activate(model, name or {})
        expected.append(model(sample))
    with glora.route(model, ["a", "b", None, "a"]):
        torch.testing.assert_close(model(x), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_prompt_is_multiplied_in_float32_in_autocast_too() -> None:
    model = attach(quantised(), GLoRAConfig.prompt(init="random"))
    bias = model[0].bias
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model[0].bias, bias)


def test_its_fingerprint_is_that_of_the_numbers_it_stands_for() -> None:
    weight = quantised()[0].weight
    assert fingerprint(weight) == fingerprint(weight.dequantize()) != fingerprint(quantised()[0].weight)


def test_tied_quantised_weights_are_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    quantise_rows(model)
    model[1].weight = model[0].weight
    refused(model, "its weight is tied to 1.weight", ["0"])


def test_a_merge_of_biases_alone_keeps_the_quantised_weight() -> None:
    model = quantised()
    W0 = model[0].weight
    glora.apply(model, config=GLoRAConfig.bitfit(init="random"))
    y = model(x := torch.randn(3, 64))
    glora.merge(model)
    assert model[0].weight is W0
    torch.testing.assert_close(model(x), y)


class Rough(Int8Rows):
    """One that cannot be cut into rows."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.slice.Tensor:
            raise NotImplementedError("no rows")
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_what_is_refused_says_what_to_do() -> None:
    model = quantised()
    model[0].weight.act_quant_kwargs = "dynamic"
    refused(model, "'0' is not: its weight is quantised .a Int8Rows.*inputs too .*quantise weights only", ["0"])
    model = block()
    model[0].weight = nn.Parameter(Rough(torch.ones(32, 64, dtype=torch.int8), torch.ones(32, 1)), requires_grad=False)
    refused(model, "rows cannot be dequantised .*no rows.*Int8WeightOnlyConfig", ["0"])

    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    own = nn.Sequential(Own(64, 32))
    quantise_rows(own)
    refused(own, "the layer's forward is its own.*exclude=", ["0"])
    refused(quantised(), "its weight is a Int8Rows", ["0"], trainable=["2"])
    with pytest.raises(RuntimeError, match=r"as tying and quantising.*before glora.apply"):
        quantise_rows(attach(block()))


def test_a_block_of_rows_is_in_floating_point_and_the_tensor_itself_where_it_is_all_of_a_plain_one() -> None:
    plain, weight = torch.randn(6, 4), quantised()[0].weight
    assert rows(plain, slice(0, 6)) is plain
    assert dense(plain) is storage_of(plain) is plain
    for tensor in (plain, weight):
        for start, stop in ((0, len(tensor)), (2, 5), (0, 1)):
            found = rows(tensor, slice(start, stop))
            assert type(found) in (Tensor, nn.Parameter)
            torch.testing.assert_close(found, dense(tensor)[start:stop])
    assert storage_of(weight).dtype == torch.int8


@pytest.mark.usefixtures("one_rank")
def test_a_whole_tensor_goes_into_a_sharded_one_and_comes_back() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = torch.randn(6, 4)
    sharded = distribute_tensor(torch.zeros(6, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
    assert (is_sharded(sharded), is_sharded(whole)) == (True, False)
    assert gathered(whole) is whole
    for from_first in (True, False):
        found = sharded_like(sharded, whole, from_first=from_first)
        assert is_sharded(found)
        assert torch.equal(gathered(found), whole)
        assert sharded_like(whole, whole, from_first=from_first) is whole
    replica = replicated_like(sharded, whole)
    assert torch.equal(replica.to_local(), whole)
    write_into(sharded, whole)
    assert torch.equal(gathered(sharded), whole)
    write_into(whole, 2 * sharded)
    assert torch.equal(2 * gathered(sharded), whole)
