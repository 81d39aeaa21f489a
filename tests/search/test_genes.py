"""Genes keep to the budget, and to what they inherit as far as it fits."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from glora.search import Space
from glora.search.choices import layers_of
from glora.search.genes import Genes
from tests.helpers.search import block, spaces, supernet

# Two forms of a path at most: all choices of two layers are counted.
small_spaces = st.builds(
    lambda A, B, E, ranks: Space(A=A, B=B, C=["none"], D=["none"], E=E, ranks=ranks),
    st.sampled_from([["none"], ["lora", "vector"], ["constant", "none"]]),
    st.sampled_from([["lora"], ["lora", "constant"], ["vector", "none"]]),
    st.sampled_from([["none"], ["vector", "none"]]),
    st.sampled_from([[1], [2, 1]]),
)


@given(space=spaces(), seed=st.integers(0, 2**16), inherits=st.booleans(), room=st.floats(0, 1))
def test_a_fitted_choice_is_complete_and_within_the_budget(
    space: Space, seed: int, inherits: bool, room: float
) -> None:
    layers, rng = layers_of(supernet(block(), space)), random.Random(seed)
    assume(any(len(forms) > 1 for forms in space.forms.values()))
    least = sum(layer.count(layer.space.smallest) for layer in layers.values())
    most = sum(layer.count(layer.space.largest) for layer in layers.values())
    budget = least + int(room * (most - least))
    genes = Genes(layers, budget)
    inherited = {gene: rng.choice(values) for gene, values in genes.values.items()} if inherits else {}
    fitted = genes.fit(inherited, rng)
    assert fitted.keys() == genes.values.keys()
    assert all(value in genes.values[gene] for gene, value in fitted.items())
    assert genes.parameters(genes.configs(fitted)) <= budget
    if inherits and genes.parameters(genes.configs(inherited)) <= budget:
        assert fitted == inherited


@given(space=small_spaces, seed=st.integers(0, 2**16), room=st.floats(0, 1))
def test_every_choice_within_the_budget_comes_once(space: Space, seed: int, room: float) -> None:
    torch.manual_seed(seed)
    layers = layers_of(supernet(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3, bias=False)), space))
    assume(any(len(forms) > 1 for forms in space.forms.values()))
    whole = Genes(layers, None)
    least = whole.parameters({path: layer.space.smallest for path, layer in layers.items()})
    most = whole.parameters({path: layer.space.largest for path, layer in layers.items()})
    genes = Genes(layers, least + int(room * (most - least)))
    possible = [
        [layer.space.config(dict(zip("ABCDE", forms, strict=True)), rank) for rank in space.ranks]
        for layer in layers.values()
        for forms in itertools.product(*layer.space.forms.values())
    ]
    of_layer = {
        path: {c for each in possible for c in each if not layer.space.why_not(c)} for path, layer in layers.items()
    }
    choices = [dict(zip(layers, each, strict=True)) for each in itertools.product(*of_layer.values())]
    wanted = {repr(choice) for choice in choices if genes.parameters(choice) <= genes.budget}
    found = [repr(genes.configs(each)) for each in genes.every()]
    assert len(found) == len(set(found))
    assert set(found) == wanted
    assert all(each.keys() == genes.values.keys() for each in genes.every())


def test_a_budget_below_the_smallest_choice_and_a_single_choice_are_refused() -> None:
    layers = layers_of(supernet(nn.Linear(3, 2), Space(A=["none"], B=["lora", "vector"])))
    with pytest.raises(ValueError, match="budget=1 must hold the smallest choice of the space, of 2 parameters"):
        Genes(layers, 1)
    layers = layers_of(supernet(nn.Linear(3, 2), Space(A=["none"], B=["vector"], C=["none"], D=["none"], E=["none"])))
    with pytest.raises(ValueError, match="more than one choice"):
        Genes(layers, None)
