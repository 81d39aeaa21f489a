"""Attaching a supernet and switching it: kernels, costs, compiled code, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import glora
from benchmarks.counting import count_products
from glora import GLoRAConfig
from glora.search import Space, choose, spaces
from tests.helpers.calls import RANDOM, attach, warned
from tests.helpers.internals import chosen_kernel, kernels_taken
from tests.helpers.search import any_choice, block, supernet
from tests.helpers.state import unchanged

LORA = GLoRAConfig.lora(rank=2)


def test_a_start_that_changes_nothing_in_any_choice() -> None:
    model, x = block(), torch.randn(3, 6)
    y = model(x)
    glora.search.supernet(model, "all-linear", Space())
    for seed in range(5):
        assert torch.allclose(choose(model, any_choice(model, seed))(x), y)


def test_one_set_of_tensors_for_all_forms() -> None:
    model = glora.search.supernet(block(), "all-linear", Space(ranks=[2, 4]))
    largest = glora.plan(block(), config=Space(ranks=[2, 4]).largest)
    assert sum(p.numel() for p in glora.parameters(model)) == largest.parameters


def test_a_choice_without_an_elementwise_low_rank_A_goes_the_cheap_way() -> None:
    layer = supernet(nn.Linear(64, 64))
    assert chosen_kernel(layer, 8, True) == "blockwise"
    choose(layer, {"": Space().config({"A": "vector", "B": "lora"}, 2)})
    assert chosen_kernel(layer, 8, True) == "factored"
    with count_products() as count:
        layer(torch.randn(128, 64)).sum().backward()
    assert count.flops < 1.2 * 2 * 2 * 128 * 64 * 64  # x asks for no gradient: the forward's product, and thin ones


def test_a_choice_of_nothing_runs_the_base() -> None:
    layer, x = nn.Linear(4, 5), torch.randn(3, 4)
    y = layer(x)
    supernet(layer)
    with kernels_taken() as taken:
        assert torch.equal(choose(layer, {})(x), y)
    assert all(kernel == "factored" for kernel in taken)


def test_switching_back_recompiles_nothing() -> None:
    torch._dynamo.reset()
    net, x, compiled = supernet(block()).eval(), torch.randn(3, 6), 0

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        nonlocal compiled
        compiled += 1
        return graph.forward

    run = torch.compile(net, backend=backend, fullgraph=True)
    choices = [any_choice(net, seed) for seed in (0, 20, 40)]
    wanted = [choose(net, choice)(x) for choice in choices]
    for choice, y in zip(choices, wanted, strict=True):
        choose(net, choice)
        assert torch.allclose(run(x), y, atol=1e-6)
    first = compiled
    assert first == 3
    for choice, y in zip(choices[::-1] * 2, wanted[::-1] * 2, strict=True):
        choose(net, choice)
        assert torch.allclose(run(x), y, atol=1e-6)
    assert compiled == first


def test_a_supernet_beside_another_adapter_and_head() -> None:
    model, x = attach(block(), RANDOM, name="other"), torch.randn(3, 6)
    other = model(x)
    supernet(model, targets=["0"], name="net")
    assert glora.adapters(model) == {"other": 0.0, "net": 1.0}
    assert list(spaces(model)) == ["0"]
    glora.activate(model, "other")
    assert torch.equal(choose(model, {"0": LORA})(x), other)


def test_a_layer_without_a_bias_has_A_and_B() -> None:
    model = block(bias=False)
    messages = warned(lambda: glora.search.supernet(model, "all-linear", Space()))
    assert len(messages) == 1
    assert "no bias" in messages[0]
    found = spaces(model)
    assert found["0"].forms == {**Space().forms, "C": ("none",), "D": ("none",), "E": ("none",)}
    assert found["2"] == Space()


def test_a_layer_in_which_nothing_is_drawn_is_named() -> None:
    model = nn.MultiheadAttention(4, 2)
    messages = warned(lambda: glora.search.supernet(model, ["out_proj"], Space()))
    assert len(messages) == 1
    assert "out_proj" in messages[0]


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ({"1": LORA}, "'1' is no layer"),
        ({"0": GLoRAConfig.lora(rank=3)}, "rank=3, where it may be 2 or 4 or 8"),
        ({"0": GLoRAConfig(C="lora", rank=2)}, "C='lora', where C may be vector or none"),
        ({"0": GLoRAConfig.lora(rank=2, alpha=1.0)}, "alpha=1.0"),
        ({"0": GLoRAConfig.lora(rank=2, product="matmul")}, "product='matmul'"),
        ({"0": "lora"}, "'lora', no GLoRAConfig"),
    ],
)
def test_choices_outside_of_the_space_are_refused(targets: dict[str, GLoRAConfig], said: str) -> None:
    model, x = supernet(block(), Space(C=["none", "vector"])), torch.randn(3, 6)
    choose(model, {"0": LORA})
    y = model(x)
    for call in (choose, glora.search.extract):
        with unchanged(model), pytest.raises(ValueError, match=said):
            call(model, targets)
    assert torch.equal(model(x), y)


def test_a_space_without_none_wants_every_layer() -> None:
    model = supernet(block(), Space(B=["lora", "vector"]))
    with pytest.raises(ValueError, match="B='none', where B may be lora or vector"):
        choose(model, {"0": LORA})


def test_wrong_states_are_refused() -> None:
    with pytest.raises(ValueError, match="must have one supernet; found none"):
        choose(attach(block()), None)
    model = supernet(supernet(block(), name="a"), name="b")
    with pytest.raises(ValueError, match="found a, b|found b, a"):
        choose(model, None)
    with glora.merged(model), pytest.raises(RuntimeError, match=r"Inside glora\.merged"):
        choose(model, None)
    with pytest.raises(ValueError, match=r"must be a glora\.search\.Space"):
        glora.search.supernet(block(), "all-linear", LORA)


@pytest.mark.parametrize(
    "wrong", [{"A": []}, {"A": "lora"}, {"B": ["low"]}, {"ranks": [0]}, {"ranks": []}, {"alpha": -1.0}, {"E": ["lora"]}]
)
def test_spaces_of_nothing_or_unknown_forms_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        Space(**wrong)
