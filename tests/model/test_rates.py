"""glora.parameter_groups: every parameter once, at the rate that balances it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from tests.helpers.strategies import configs


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))


@given(config=configs())
def test_every_parameter_is_in_one_group(config: glora.GLoRAConfig) -> None:
    model = glora.apply(model_of(), ["0", "1"], config, trainable=["2"])
    groups = glora.parameter_groups(model, 0.1)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in glora.parameters(model))
    assert all(group["params"] and group["lr"] > 0 for group in groups)
    (heads,) = (group for group in groups if group["name"] == "heads")
    assert {p.shape for p in heads["params"]} == {(3, 8), (3,)}


def after_a_step(config: glora.GLoRAConfig) -> torch.Tensor:
    """Outputs after a step of Adam in float64, from a start that is the same for all configs."""
    model = glora.apply(model_of().double(), ["1"], config)
    generator = torch.Generator().manual_seed(3)
    A = model[1].parametrizations.weight[0].default.A
    with torch.no_grad():
        A.right.copy_(torch.rand(A.right.shape, generator=generator, dtype=torch.float64) - 0.5)
    x = torch.randn(32, 6, generator=generator, dtype=torch.float64)
    optimizer = torch.optim.Adam(glora.parameter_groups(model, 1e-2), eps=1e-30)
    model(x).square().mean().backward()
    optimizer.step()
    return model(x).detach()


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_the_rates_do_to_a_first_step_what_a_balance_does(product: Any) -> None:
    """And neither corrects what the other has corrected."""
    paths = {"A": "lora", **dict.fromkeys("BCDE", "none")}
    found = [
        after_a_step(glora.GLoRAConfig.glora(**paths, rank=2, product=product, balance=each))
        for each in ("rms", "none")
    ]
    torch.testing.assert_close(*found)


def test_an_optimizers_state_goes_into_another_one_made_alike() -> None:
    model = glora.apply(model_of(), ["0", "1"], glora.GLoRAConfig.glora(balance="none"), trainable=["2"])
    optimizer = torch.optim.AdamW(glora.parameter_groups(model, 1e-2))
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    other = copy.deepcopy(model)
    again = torch.optim.AdamW(glora.parameter_groups(other, 1e-2))
    again.load_state_dict(optimizer.state_dict())
    for one, two in zip(optimizer.param_groups, again.param_groups, strict=True):
        assert (one["name"], one["lr"]) == (two["name"], two["lr"])


@given(lr=st.sampled_from([0, -1.0, float("nan")]))
def test_a_rate_that_is_none_is_refused(lr: float) -> None:
    with pytest.raises(ValueError, match="lr must be a positive number"):
        glora.parameter_groups(glora.apply(model_of(), config=glora.GLoRAConfig.glora()), lr)


def test_of_unequal_experts_the_largest_sets_the_rate() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 8, 4) * torch.tensor([1e-6, 0.02, 0.5]).view(3, 1, 1))

    glora.register_matrix(Experts, {"kernel": None}, "e o i -> e o i")
    model = glora.apply(Experts(), ["kernel"], glora.GLoRAConfig.hira(rank=2, balance="none"))
    assert max(group["lr"] for group in glora.parameter_groups(model, 1.0)) == pytest.approx(2.0, rel=0.5)


def test_a_supernet_has_the_plain_rate() -> None:
    space = glora.search.Space(A=["lora", "vector", "none"], ranks=[2])
    model = glora.search.supernet(model_of(), ["1"], space)
    assert [group["lr"] for group in glora.parameter_groups(model, 0.1)] == [0.1]
