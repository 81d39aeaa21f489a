"""A random start moves the layer by about a tenth, whatever its weight: the sizes of what is drawn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import glora
from tests.helpers.calls import only


@pytest.mark.parametrize("entry", [0.0, 0.003, 2.0])
@pytest.mark.parametrize("path", ["A", "B", "C", "D", "E"])
def test_a_random_start_draws_half_to_three_halves_of_its_size_in_either_sign(path: str, entry: float) -> None:
    inp, out = (4096, 3) if path == "C" else (3, 4096)
    plain = nn.Linear(inp, out)
    nn.init.constant_(plain.weight, entry)
    layer = glora.apply(plain, config=only(**{path: "vector"}, init="random"))
    (value,) = glora.parameters(layer)
    norm = entry * (out * inp) ** 0.5 or out**0.5  # a weight of zeros counts as nn.Linear's own start
    size = {"B": 0.1 * norm / (out * inp) ** 0.5, "E": 0.1 * norm / out**0.5}.get(path, 0.1)
    sizes = value.detach().abs() / size
    assert 0.499 < sizes.min() < 0.51
    assert 1.49 < sizes.max() < 1.501
    assert 0.45 < (value > 0).float().mean() < 0.55


def test_the_size_of_a_half_precision_weight_does_not_overflow() -> None:
    plain = nn.Linear(64, 64, dtype=torch.float16)
    nn.init.constant_(plain.weight, 100.0)  # the squares sum up to 4e7
    layer = glora.apply(plain, config=only(B="vector", init="random"))
    assert torch.isfinite(layer.weight).all()
