"""The first-order effect of each form, and the knapsack over them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import glora
from glora.search import Space, choose, knapsack, sensitivity
from glora.search.supernet import layers_of
from tests.helpers.search import block, supernet

X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), torch.zeros(16, 6)


def loss(model: nn.Module, rows: slice) -> Tensor:
    return (model(X[rows]) - Y[rows]).square().mean()


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_it_is_the_gradient_of_each_form_of_its_own(product: str) -> None:
    space = Space(ranks=[1, 3], product=product)
    model = glora.search.supernet(block(), "all-linear", space)
    effects = sensitivity(model, loss, [slice(0, 8), slice(8, 16)])
    assert effects.keys() == {"0", "2"}
    for path, layer in layers_of(model).items():
        assert effects[path].keys() == layer.costs.keys()
        for (p, form, rank), found in effects[path].items():
            if form == "none":
                assert found == 0
                continue
            choose(model, {path: space.config({p: form}, rank)})
            model.zero_grad()
            loss(model, slice(0, 16)).backward()  # the mean of the two halves
            wanted = sum(q.grad.abs().sum().item() for q in glora.parameters(model) if q.grad is not None)
            assert found == pytest.approx(wanted, rel=1e-4)


def test_it_leaves_gradients_choice_and_flags() -> None:
    model = glora.search.supernet(block(), "all-linear", Space())
    choose(model, {"0": Space().largest})
    loss(model, slice(0, 8)).backward()
    before = [None if p.grad is None else p.grad.clone() for p in glora.parameters(model)]
    y = model(X)
    sensitivity(model, loss, [slice(0, 8)])
    for grad, p in zip(before, glora.parameters(model), strict=True):
        assert (grad is None) == (p.grad is None)
        assert grad is None or torch.equal(grad, p.grad)
    assert torch.equal(model(X), y)


def test_it_is_of_the_start_and_of_a_batch() -> None:
    with pytest.raises(RuntimeError, match="has been trained"):
        sensitivity(supernet(block()), loss, [slice(0, 8)])
    with pytest.raises(ValueError, match="needs a batch"):
        sensitivity(glora.search.supernet(block(), "all-linear", Space()), loss, [])


def test_the_knapsack_keeps_to_the_budget_and_fills_it() -> None:
    model = glora.search.supernet(block(), "all-linear", Space())
    effects, layers = sensitivity(model, loss, [slice(0, 16)]), layers_of(model)
    gained = []
    for budget in (0, 1, 5, 20, 60, 150, 10**6):
        targets = knapsack(model, effects, budget)
        spent = sum(layers[path].count(config) for path, config in targets.items())
        assert spent <= budget
        assert budget - spent < 8 or budget > 400  # no more is left than a vector needs
        gained.append(sum(effects[t][p, f, c.rank] for t, c in targets.items() for p, f in c.forms.items()))
    assert gained == sorted(gained)


def test_the_knapsack_is_near_the_best_of_all_choices() -> None:
    space = Space(A=["none"], C=["none"], D=["none"], ranks=[1])
    model = glora.search.supernet(block(), "all-linear", space)
    effects, layers = sensitivity(model, loss, [slice(0, 16)]), layers_of(model)

    def value(choice: dict[str, glora.GLoRAConfig]) -> float:
        return sum(effects[t][p, f, c.rank] for t, c in choice.items() for p, f in c.forms.items())

    configs = [space.config({"B": b, "E": e}, 1) for b in space.B for e in space.E]
    for budget in (7, 9, 15, 23, 29):
        best = max(
            value({"0": first, "2": second})
            for first, second in itertools.product(configs, configs)
            if layers["0"].count(first) + layers["2"].count(second) <= budget
        )
        assert value(knapsack(model, effects, budget)) >= 0.8 * best
