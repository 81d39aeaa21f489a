"""Routes over batches in another dimension, and over flattened rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import glora
from tests.helpers.calls import RANDOM

NAMES = st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=5)


class Flattening(nn.Module):
    """Flattens samples and tokens into rows in front of its layer, as OPT does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, 4)).reshape(*x.shape[:-1], 3)


def two_adapters(model: Any) -> Any:
    torch.manual_seed(0)
    for name in ("a", "b"):
        glora.apply(model, config=RANDOM, name=name)
    return model.eval()


def alone(model: Any, x: Tensor, name: str | None) -> Tensor:
    glora.activate(model, {} if name is None else name)
    return model(x)


@given(names=NAMES, tokens=st.integers(1, 4))
def test_flattened_rows_go_through_their_samples_adapter(names: list[str | None], tokens: int) -> None:
    model = two_adapters(Flattening())
    x = torch.randn(len(names), tokens, 4)
    expected = torch.cat([alone(model, x[i : i + 1], name) for i, name in enumerate(names)])
    with glora.route(model, names, flattened=True):
        assert torch.allclose(model(x), expected, atol=1e-6)


@given(names=NAMES, tokens=st.integers(1, 5))
def test_a_batch_in_dimension_one_is_split_there_also_when_the_sizes_are_equal(
    names: list[str | None], tokens: int
) -> None:
    model = two_adapters(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    x = torch.randn(tokens, len(names), 4)
    expected = torch.cat([alone(model, x[:, i : i + 1], name) for i, name in enumerate(names)], 1)
    with glora.route(model, names, dim=1):
        assert torch.allclose(model(x), expected, atol=1e-6)


def test_rows_are_refused_unless_they_are_said_to_be_flattened() -> None:
    model = two_adapters(Flattening())
    with glora.route(model, ["a", "b"]), pytest.raises(ValueError, match="flattened=True"):
        model(torch.randn(2, 3, 4))
    with glora.route(model, ["a", "b", "a"], flattened=True), pytest.raises(ValueError, match="not that many samples"):
        model(torch.randn(2, 2, 4))
    with glora.route(model, ["a", "b"], dim=2), pytest.raises(ValueError, match="dimension 2"):
        model(torch.randn(2, 2, 4))


@pytest.mark.parametrize("dim", [-1, 0.5, None])
def test_a_dim_that_is_none_is_refused(dim: Any) -> None:
    model = two_adapters(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="dim must be"), glora.route(model, ["a"], dim=dim):
        pass


def test_attention_that_is_adapted_itself_is_routed_with_its_output_projection() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    for name in ("a", "b"):
        glora.apply(attention, config=RANDOM, name=name)
    x = torch.randn(3, 5, 4)
    expected = []
    for i, name in enumerate(["a", None, "b"]):
        glora.activate(attention, {} if name is None else name)
        expected.append(attention(x[i : i + 1], x[i : i + 1], x[i : i + 1])[0])
    with glora.route(attention, ["a", None, "b"]):
        assert torch.allclose(attention(x, x, x)[0], torch.cat(expected), atol=1e-6)
