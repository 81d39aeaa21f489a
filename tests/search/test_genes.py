"""Genes keep to the budget, and to what they inherit as far as it fits."""

from __future__ import annotations

import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from glora.search import Space
from glora.search.choices import layers_of
from glora.search.genes import Genes
from tests.helpers.search import block, spaces, supernet


@given(space=spaces(), seed=st.integers(0, 2**16), inherits=st.booleans(), room=st.none() | st.floats(0, 1))
def test_a_fitted_choice_is_complete_and_within_the_budget(
    space: Space, seed: int, inherits: bool, room: float | None
) -> None:
    layers, rng = layers_of(supernet(block(), space)), random.Random(seed)
    assume(any(len(forms) > 1 for forms in space.forms.values()))
    free = Genes(layers, None)
    least = free.parameters(free.configs({}))
    most = sum(layer.count(layer.space.largest) for layer in layers.values())
    inherited = {gene: rng.choice(values) for gene, values in free.values.items()} if inherits else {}
    # None: as much as what is inherited takes, and no more.
    budget = free.parameters(free.configs(inherited)) if room is None else least + int(room * (most - least))
    genes = Genes(layers, budget)
    fitted = genes.fit(inherited, rng)
    assert fitted.keys() == genes.values.keys()
    assert all(value in genes.values[gene] for gene, value in fitted.items())
    assert genes.parameters(genes.configs(fitted)) <= budget
    if inherits and genes.parameters(genes.configs(inherited)) <= budget:
        assert fitted == inherited


def test_a_budget_below_the_smallest_choice_and_a_single_choice_are_refused() -> None:
    layers = layers_of(supernet(nn.Linear(3, 2), Space(A=["none"], B=["lora", "vector"])))
    with pytest.raises(ValueError, match="budget=1 must hold the smallest choice of the space, of 2 parameters"):
        Genes(layers, 1)
    layers = layers_of(supernet(nn.Linear(3, 2), Space(A=["none"], B=["vector"], C=["none"], D=["none"], E=["none"])))
    with pytest.raises(ValueError, match="more than one choice"):
        Genes(layers, None)
