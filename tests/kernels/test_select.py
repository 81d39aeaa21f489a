"""Which kernel a layer takes."""

from __future__ import annotations

import torch
from torch import nn

import glora
from tests.helpers import internals
from tests.helpers.calls import RANDOM, only


def test_the_choice_goes_by_the_forms_the_tokens_and_the_gradient() -> None:
    def chosen(config: glora.GLoRAConfig, tokens: int, grad: bool) -> internals.Kernel | None:
        layer = glora.apply(nn.Linear(8, 8), config=config)
        return internals.chosen_kernel(layer, tokens, grad)

    low = only(A="lora", rank=3)
    assert chosen(low, 1, True) == "blockwise"
    assert chosen(low, 1, False) == "expanded"
    assert chosen(low, 10_000, False) == "blockwise"
    assert chosen(only(A="lora", product="matmul"), 10_000, True) == "factored"
    assert chosen(only(A="vector", B="lora"), 1, False) == "factored"
    with internals.force_kernel("dense"):
        assert chosen(low, 1, False) == "dense"


def test_a_base_that_is_not_frozen_trains_too() -> None:
    layer = glora.apply(nn.Linear(3, 2), config=RANDOM, freeze=False)
    layer(torch.randn(4, 3)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
