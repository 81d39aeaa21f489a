"""How an adapter starts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import glora
from tests.helpers.calls import FORMS, only

LOW_RANK = [("A", "hadamard"), ("A", "matmul"), ("B", "hadamard"), ("C", "hadamard")]
low_rank = pytest.mark.parametrize(("path", "product"), LOW_RANK, ids=["A", "A of a matrix product", "B", "C"])


@low_rank
@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("alpha", [None, 0.05, 40.0])
def test_a_random_start_moves_by_a_tenth_whatever_the_rank_and_alpha(
    path: str, product: str, rank: int, alpha: float | None
) -> None:
    layer = glora.apply(
        nn.Linear(40, 30), config=only(**{path: "lora"}, product=product, rank=rank, alpha=alpha, init="random")
    )
    tensor = "bias" if path == "C" else "weight"
    W0 = layer.parametrizations.weight.original if tensor == "weight" else layer.weight
    moved = (getattr(layer, tensor) - layer.parametrizations[tensor].original).norm() / W0.norm()
    assert 0.03 < moved < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("path", "form"), [(path, form) for path in "BE" for form in FORMS[path][:-1]])
def test_a_random_start_moves_a_weight_of_zeros(path: str, form: str, dtype: torch.dtype) -> None:
    plain = nn.Linear(40, 30, dtype=dtype)
    norm = plain.weight.detach().float().norm()
    nn.init.zeros_(plain.weight)
    nn.init.zeros_(plain.bias)
    layer = glora.apply(plain, config=only(**{path: form}, init="random"))
    # By as much as it would move nn.Linear's own start.
    moved = (layer.weight if path == "B" else layer.bias).float().norm()
    assert 0.03 < moved / norm < 0.3


@low_rank
def test_random_factors_are_of_either_sign_and_nowhere_near_zero(path: str, product: str) -> None:
    for form in [form for form in FORMS[path] if form not in ("none", "constant")]:
        layer = glora.apply(nn.Linear(40, 30), config=only(**{path: form}, product=product, init="random"))
        for factor in glora.parameters(layer):
            assert 0.2 < (factor > 0).float().mean() < 0.8
            assert factor.abs().min() > 0.3 * factor.abs().max()


def test_random_constants_are_of_either_sign() -> None:
    for path in ("A", "B", "D", "E"):
        config: Any = only(**{path: "constant"}, init="random")
        layers = [glora.apply(nn.Linear(3, 2), config=config) for _ in range(20)]
        assert {bool(next(glora.parameters(layer)) > 0) for layer in layers} == {True, False}


@low_rank
def test_identity_starts_from_a_zero_left_and_a_kaiming_uniform_right(path: str, product: str) -> None:
    layer = glora.apply(nn.Linear(64, 48), config=only(**{path: "lora"}, product=product, rank=64))
    tensors = glora.state_dict(layer)
    left, right = tensors[f"{path}.left"], tensors[f"{path}.right"]
    assert not left.any()
    # With a = sqrt(5) the bound is 1 / sqrt(fan in), as for nn.Linear's own weight.
    bound = 1 / math.sqrt(right.shape[1])
    assert 0.9 * bound < right.abs().max() <= bound
    assert abs(right.std() / (bound / math.sqrt(3)) - 1) < 0.2
    assert (right < 0).any()
    assert (right > 0).any()
