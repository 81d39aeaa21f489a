"""What a layer may choose from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glora import GLoRAConfig
from glora.search import Space
from tests.helpers.search import any_config, spaces


@given(space=spaces(), seed=st.integers(0, 2**16))
def test_its_configs_are_in_it(space: Space, seed: int) -> None:
    for config in (space.largest, any_config(space, seed)):
        assert space.why_not(config) is None


def test_a_rank_has_no_say_without_a_low_rank_path() -> None:
    space = Space(ranks=[2, 8])
    assert space.config({"B": "vector"}, 8) == space.config({"B": "vector"}, 2)
    assert space.why_not(GLoRAConfig.glora(A="none", B="vector", rank=5)) is None


@pytest.mark.parametrize(
    "wrong", [{"A": []}, {"A": "lora"}, {"B": ["low"]}, {"ranks": [0]}, {"ranks": []}, {"alpha": -1.0}, {"E": ["lora"]}]
)
def test_spaces_of_nothing_or_unknown_forms_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        Space(**wrong)
