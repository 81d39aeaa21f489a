"""Modules that hold their tensors in ways of their own, as heads: what they compute follows the adapter."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import glora
from tests.helpers.calls import LORA
from tests.helpers.state import clones, same

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class OfList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.held = nn.ParameterList([torch.randn(4, 4), torch.randn(4)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.held
        return x @ first + second * len(self.held)


class OfDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.held = nn.ParameterDict({"w": torch.randn(4, 4), "b": torch.randn(4)})

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.held["w"] + self.held.b + sum(value.sum() for value in self.held.values())


class Attends(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x[None], x[None], x[None], need_weights=False)[0][0]


class Layer(nn.Module):
    """A fused fast path in eval, which reads the tensors of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x[None])[0]


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "list": OfList,
    "dict": OfDict,
    "attention": Attends,
    "attention without bias": lambda: Attends(bias=False),
    "attention with biases of keys and values": lambda: Attends(add_bias_kv=True),
    "fused layer": Layer,
    "the older weight_norm": lambda: weight_norm(nn.Linear(4, 4)),
    "the older spectral_norm": lambda: spectral_norm(nn.Linear(4, 4)),
    "weight_norm without a bias": lambda: parametrizations.weight_norm(nn.Linear(4, 4, bias=False)),
    "orthogonal without a bias": lambda: parametrizations.orthogonal(nn.Linear(4, 4, bias=False)),
    "pruned": pruned,
    "group norm": lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.PReLU(4)),
    "bags": lambda: nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_any_kind_computes_with_what_the_adapter_has(kind: str) -> None:
    torch.manual_seed(0)
    with torch.no_grad():  # what the older hooks compute would be no leaf, which torch does not copy
        plain = nn.Sequential(nn.Linear(4, 4), KINDS[kind]()).eval()
        plain(X)
    model = copy.deepcopy(plain)
    base, held = clones(model.state_dict()), list(model.parameters())
    with torch.no_grad():
        glora.apply(model, ["0"], LORA, trainable=["1"])
        torch.testing.assert_close(model(X), plain(X))
    model(X).pow(3).sum().backward()
    trained = dict(glora.named_parameters(model))
    assert all(p.grad is not None for key, p in trained.items() if p.requires_grad and key.startswith("1"))
    torch.optim.SGD(trained.values(), lr=0.1).step()
    model.zero_grad()
    with torch.no_grad():
        # What the base would compute with these tensors in place of its own.
        other = copy.deepcopy(plain)
        tensors = {key: value for key, value in glora.state_dict(model).items() if key.startswith("1")}
        other.load_state_dict({**base, **tensors})
        y = other[1](X)
        assert not torch.allclose(y, plain[1](X), atol=1e-3)
        torch.testing.assert_close(model[1](X), y)
        with glora.disabled(model):
            torch.testing.assert_close(model[1](X), plain[1](X))
        torch.testing.assert_close(model[1](X), y)
        with glora.merged(model):
            torch.testing.assert_close(model[1](X), y)
        replica = copy.deepcopy(model)
        with tempfile.TemporaryDirectory() as folder:
            glora.save(model, folder)
            loaded = glora.load(copy.deepcopy(plain), folder, strict=True)
        torch.testing.assert_close(loaded[1](X), y)
        glora.remove(model)
        assert same(model.state_dict(), base)
        assert [id(p) for p in model.parameters()] == [id(p) for p in held]
        torch.testing.assert_close(model[1](X), plain[1](X))
        torch.testing.assert_close(replica[1](X), y)
        glora.merge(replica)
        torch.testing.assert_close(replica[1](X), y)
