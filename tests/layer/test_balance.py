"""Balance (Note [Balance]): what a first step of each path does to the outputs, and where the number is kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import glora
from tests.helpers.internals import describe

IN, OUT, RATE = 192, 160, 1e-3
ALIGNED = math.sqrt(1 + 2 * IN / (math.pi * OUT))  # what a step that goes through W0 does more
NONE: dict[str, Any] = dict.fromkeys("ABCDE", "none")


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def layer_of(size: float, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(IN, OUT)
    nn.init.normal_(layer.weight, std=size)
    nn.init.normal_(layer.bias, std=0.3)
    return layer


def balance_in(layer: Any) -> Any:
    return layer.parametrizations.weight[0].default.A.balance


def first_step(layer: nn.Linear, config: glora.GLoRAConfig, spread: float) -> float:
    """The rms of what Adam's first step moves the outputs of inputs that the step has not seen by."""
    glora.apply(layer, config=config)
    optimizer = torch.optim.Adam(glora.parameters(layer), lr=RATE)
    seen, unseen = spread * torch.randn(64, IN), spread * torch.randn(512, IN)
    before = layer(unseen).detach()
    (layer(seen) * torch.randn(64, OUT)).sum().backward()
    optimizer.step()
    return rms(layer(unseen).detach() - before)


class Sizes(NamedTuple):
    """The rank, and the root mean squares of W0, the inputs and b0."""

    rank: int
    weight: float
    inputs: float
    bias: float


# What Note [Balance] says that an output moves by, as a multiple of the learning rate.
DERIVED: dict[str, tuple[dict[str, Any], Callable[[Sizes], float]]] = {
    "B lora": ({"B": "lora"}, lambda of: math.sqrt(of.rank / 3) * of.inputs),
    "A lora": ({"A": "lora"}, lambda of: math.sqrt(of.rank / 3) * of.inputs * of.weight),
    "A lora matmul": (
        {"A": "lora", "product": "matmul"},
        lambda of: math.sqrt(of.rank / 3) * of.inputs * math.sqrt(IN) * of.weight * ALIGNED,
    ),
    "B vector": ({"B": "vector"}, lambda of: math.sqrt(IN) * of.inputs),
    "A vector": ({"A": "vector"}, lambda of: math.sqrt(IN) * of.weight * of.inputs),
    "A vector matmul": ({"A": "vector", "product": "matmul"}, lambda of: math.sqrt(IN) * of.weight * of.inputs),
    "C vector": ({"C": "vector"}, lambda of: math.sqrt(IN) * of.weight * ALIGNED),
    "D vector": ({"D": "vector"}, lambda of: of.bias),
    "E vector": ({"E": "vector"}, lambda _: 1.0),
}


@pytest.mark.parametrize("path", DERIVED)
@given(rank=st.sampled_from([2, 8]), size=st.sampled_from([0.01, 0.05, 0.5]), spread=st.sampled_from([0.3, 2.0]))
def test_a_first_step_moves_the_outputs_as_derived(path: str, rank: int, size: float, spread: float) -> None:
    forms, derived = DERIVED[path]
    layer = layer_of(size)
    sizes = Sizes(rank, rms(layer.weight), spread, rms(layer.bias))
    moved = first_step(layer, glora.GLoRAConfig.glora(**NONE | forms, rank=rank, balance="none"), spread)
    assert moved == pytest.approx(RATE * derived(sizes), rel=0.2)


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@given(rank=st.sampled_from([1, 4, 8]), size=st.sampled_from([1e-3, 0.05, 3.0]))
def test_a_balanced_A_moves_the_outputs_as_B_does(product: Any, rank: int, size: float) -> None:
    of_a = first_step(layer_of(size), glora.GLoRAConfig.glora(**NONE | {"A": "lora"}, rank=rank, product=product), 1.0)
    of_b = first_step(layer_of(size), glora.GLoRAConfig.lora(rank=rank), 1.0)
    assert of_a == pytest.approx(of_b * (ALIGNED if product == "matmul" else 1), rel=0.2)


@given(
    size=st.sampled_from([1e-4, 0.02, 7.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    product=st.sampled_from(["hadamard", "matmul"]),
)
def test_it_is_the_inverse_of_the_weights_size(size: float, dtype: torch.dtype, product: Any) -> None:
    layer = layer_of(size).to(dtype)
    wanted = 1 / rms(layer.weight) / (math.sqrt(IN) if product == "matmul" else 1)
    glora.apply(layer, config=glora.GLoRAConfig.glora(rank=2, product=product))
    assert balance_in(layer).item() == pytest.approx(wanted, rel=1e-5)
    assert balance_in(layer).shape == (1,)
    assert not any(parameter is balance_in(layer) for parameter in glora.parameters(layer))


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan"), 1e-38])
def test_it_is_1_where_the_weight_has_no_size(value: float) -> None:
    layer = nn.Linear(4, 3)
    nn.init.constant_(layer.weight, value)
    assert balance_in(glora.apply(layer, config=glora.GLoRAConfig.glora())).item() == 1.0


def test_each_expert_has_its_own() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 4) * torch.tensor([0.1, 1.0, 0.0]).view(3, 1, 1))

    experts = Experts()
    glora.register_matrix(Experts, {"gate_up_proj": None}, "e o i -> e o i")
    glora.apply(experts, ["gate_up_proj"], glora.GLoRAConfig.hira(rank=2))
    found = experts.parametrizations.gate_up_proj[0].default.A.balance
    W0 = experts.parametrizations.gate_up_proj.original
    assert found.shape == (3, 1, 1)
    assert found.flatten().tolist() == pytest.approx([1 / rms(W0[0]), 1 / rms(W0[1]), 1.0], rel=1e-5)


@pytest.mark.parametrize("value", [1.0, "RMS", None, True])
def test_other_values_are_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match="balance must be one of 'rms', 'none'"):
        glora.GLoRAConfig.glora(balance=value)


@pytest.mark.parametrize(
    "config", [glora.GLoRAConfig.lora(), glora.GLoRAConfig.glora(A="vector"), glora.GLoRAConfig.ssf()]
)
def test_without_a_low_rank_a_there_is_none(config: glora.GLoRAConfig) -> None:
    assert not any("balance" in key for key in glora.state_dict(glora.apply(layer_of(0.05), config=config)))


def trained(layer: nn.Linear, **options: Any) -> nn.Linear:
    glora.apply(layer, config=glora.GLoRAConfig.glora(rank=3, **options))
    for parameter in glora.parameters(layer):
        nn.init.normal_(parameter, std=0.1)
    return layer


@given(product=st.sampled_from(["hadamard", "matmul"]))
def test_a_file_keeps_it_on_a_base_of_another_size(tmp_path_factory: Any, product: Any) -> None:
    folder: Path = tmp_path_factory.mktemp("file")
    layer = trained(layer_of(0.05), product=product)
    glora.save(layer, folder)
    other = layer_of(0.5)
    with pytest.warns(UserWarning, match="trained beside others"):
        glora.load(other, folder)
    assert balance_in(other).equal(balance_in(layer))
    swapped = trained(layer_of(0.5), product=product)
    held = balance_in(swapped)
    with pytest.warns(UserWarning, match="trained beside others"):
        glora.load(swapped, folder, replace=True)
    assert balance_in(swapped) is held
    assert held.equal(balance_in(layer))


def test_a_file_without_one_reads_as_it_always_did(tmp_path: Path) -> None:
    layer = trained(layer_of(0.05), balance="none")
    glora.save(layer, tmp_path)
    assert "balance" not in (tmp_path / "glora_config.json").read_text()
    again = glora.load(layer_of(0.05), tmp_path)
    assert balance_in(again) is None
    assert torch.equal(again.weight, layer.weight)


@pytest.mark.parametrize("call", ["glora", "torch"])
@pytest.mark.parametrize("bare", [True, False])
def test_a_state_dict_brings_it_along(call: str, bare: bool) -> None:
    """Also as a plain dict, into a model that was adapted before it had the base's weights."""
    layer, other = trained(layer_of(0.05)), trained(layer_of(0.7, seed=1))
    if call == "glora":
        other.load_state_dict(glora.base_state_dict(layer), strict=True)
        held = glora.state_dict(layer)
        glora.load_state_dict(other, dict(held) if bare else held)
    else:
        held = layer.state_dict()
        other.load_state_dict(dict(held) if bare else held)
    assert torch.equal(other.weight, layer.weight)
    x = torch.randn(5, IN)
    torch.testing.assert_close(torch.compile(other, backend="eager")(x), layer(x))


def test_a_model_on_the_meta_device_has_it_once_it_has_its_weights() -> None:
    plain = layer_of(0.05)
    with torch.device("meta"):
        layer = glora.apply(nn.Linear(IN, OUT), config=glora.GLoRAConfig.glora(rank=3))
    layer.to_empty(device="cpu")
    layer.load_state_dict(plain.state_dict(), strict=True)
    glora.reset_parameters(layer)
    assert balance_in(layer).item() == pytest.approx(1 / rms(plain.weight), rel=1e-5)
    assert torch.equal(layer.weight, plain.weight)


@given(data=st.data())
def test_what_knows_no_balance_gets_it_multiplied_in(data: st.DataObject) -> None:
    product = data.draw(st.sampled_from(["hadamard", "matmul"]))
    layer = trained(layer_of(0.05), product=product, alpha=data.draw(st.sampled_from([None, 6])))
    folded = describe(layer).folded()
    config, tensors = folded.layers[""].config, folded.tensors
    assert not config.is_balanced
    assert list(folded.wanted()) == list(tensors)
    left, right = tensors["A.left"] * config.scaling, tensors["A.right"]
    W0 = layer.parametrizations.weight.original
    B = tensors["B.left"] * config.scaling, tensors["B.right"]
    wanted = glora.functional.weight(W0, (left, right), B, product=product)
    torch.testing.assert_close(layer.weight, wanted)


def test_copies_and_sums_have_it() -> None:
    layer = trained(layer_of(0.05))
    wanted = layer.weight.detach().clone()
    assert torch.equal(copy.deepcopy(layer).weight, wanted)
    glora.combine(layer, {"default": 1.0}, name="sum")
    torch.testing.assert_close(layer.weight, wanted)


def test_a_sum_whose_first_is_no_low_rank_has_none() -> None:
    layer = glora.apply(layer_of(0.05), config=glora.GLoRAConfig(A="vector", init="random"), name="vector")
    glora.apply(layer, config=glora.GLoRAConfig.hira(rank=2, init="random"), name="hira")
    glora.activate(layer, {"vector": 1.0, "hira": 1.0})
    wanted = layer.weight.detach().clone()
    glora.combine(layer, {"vector": 1.0, "hira": 1.0}, name="sum")
    torch.testing.assert_close(layer.weight, wanted)


@pytest.mark.parametrize("call", ["glora", "torch"])
@pytest.mark.parametrize("balance", ["rms", "none"])
@pytest.mark.parametrize("from_before", [True, False])
def test_equal_factors_under_another_balance_are_another_adapter(call: str, balance: Any, from_before: bool) -> None:
    """Also where keys may be missing; a description without the field is from before there was one."""
    other: Any = {"rms": "none", "none": "rms"}[balance]
    layer, given = trained(layer_of(0.05), balance=balance), trained(layer_of(0.05), balance=other)
    held: Any = glora.state_dict(given) if call == "glora" else given.state_dict()
    if from_before and other == "none":
        for description in held._metadata["glora.description"].values() if call == "glora" else ():
            del description["balance"]
    before = layer.weight.detach().clone()
    load = layer.load_state_dict if call == "torch" else partial(glora.load_state_dict, layer)
    with pytest.raises((ValueError, RuntimeError), match=f"balance {other} in the state dict, {balance} in the model"):
        load(held, strict=False)
    assert call == "torch" or torch.equal(layer.weight, before)


def test_cast_to_float16_it_stays_finite() -> None:
    layer = glora.apply(layer_of(1e-6), config=glora.GLoRAConfig.hira(rank=2)).half()
    assert layer(torch.ones(1, IN).half()).isfinite().all()
