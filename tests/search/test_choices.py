"""Switching a supernet: nothing is compiled twice, and a choice outside of the space is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import glora
from glora import GLoRAConfig
from glora.search import Space, choose, spaces
from tests.helpers.calls import warned
from tests.helpers.internals import kernels_taken
from tests.helpers.search import any_choice, block, supernet
from tests.helpers.state import unchanged

LORA = GLoRAConfig.lora(rank=2)


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


def test_a_layer_without_a_bias_has_A_and_B() -> None:
    model = block(bias=False)
    messages = warned(lambda: glora.search.supernet(model, "all-linear", Space()))
    assert len(messages) == 1
    assert "no bias" in messages[0]
    found = spaces(model)
    assert found["0"].forms == {**Space().forms, "C": ("none",), "D": ("none",), "E": ("none",)}
    assert found["2"] == Space()


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ({"1": LORA}, "'1' is no layer"),
        ({"0": GLoRAConfig.lora(rank=3)}, "rank=3, where rank may be 2 or 4 or 8"),
        ({"0": GLoRAConfig.glora(C="lora", rank=2)}, "C='lora', where C may be vector or none"),
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
