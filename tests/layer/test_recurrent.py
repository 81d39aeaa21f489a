"""Recurrent modules as heads: what they compute with is what they read by name, all their life long."""

from __future__ import annotations

import copy
import tempfile
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import glora
from tests.helpers.calls import LORA, RANDOM, quiet
from tests.helpers.state import clones, same

KINDS = [nn.RNN, nn.GRU, nn.LSTM]


@st.composite
def recurrent(draw: st.DrawFn) -> nn.RNNBase:
    kind = draw(st.sampled_from(KINDS))
    more = {"proj_size": draw(st.sampled_from([0, 2]))} if kind is nn.LSTM else {}
    options = {name: draw(st.booleans()) for name in ("bias", "batch_first", "bidirectional")}
    made: Any = kind(4, 3, num_layers=draw(st.integers(1, 2)), **options, **more)
    return made.to(draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])))


class Net(nn.Module):
    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.first, self.rnn = nn.Linear(4, 4, dtype=rnn.weight_ih_l0.dtype), rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.first(x))[0]


def states(rnn: nn.Module, x: Tensor) -> list[Tensor]:
    outputs, hidden = rnn(x)
    return [outputs, *(hidden if isinstance(hidden, tuple) else (hidden,))]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """To a few units in the last place: a product of memory that lies elsewhere may round differently."""
    each = torch.finfo(found[0].dtype).eps
    return all(torch.allclose(a, b, 8 * each, 8 * each) for a, b in zip(found, expected, strict=True))


def with_weights(rnn: nn.RNNBase, tensors: dict[str, Tensor]) -> nn.RNNBase:
    """A plain one with these weights."""
    plain = copy.deepcopy(rnn)
    plain.load_state_dict({key.removeprefix("rnn."): value for key, value in tensors.items() if key[:4] == "rnn."})
    return plain


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@given(recurrent(), st.booleans())
def test_a_recurrent_head_is_right_at_every_step(rnn: nn.RNNBase, called_before: bool) -> None:
    torch.manual_seed(0)
    plain, x = copy.deepcopy(rnn), torch.randn(3, 2, 4).to(rnn.weight_ih_l0.dtype)
    model, held = Net(rnn), list(rnn.parameters())
    base, fresh = clones(model.state_dict()), copy.deepcopy(model)
    if called_before:
        model(x)
    glora.apply(model, ["first"], RANDOM, trainable=["rnn"], name="a")
    assert equal(states(model.rnn, x), states(plain, x))
    glora.apply(model, ["first"], RANDOM, trainable=["rnn"], name="b")
    known: dict[str, nn.RNNBase] = {}
    for name in "ab":  # a step of training for each
        glora.activate(model, name)
        model.zero_grad()
        model(x).float().square().sum().backward()
        assert all(p.grad is not None for p in glora.parameters(model, name))
        torch.optim.SGD(glora.parameters(model, name), lr=0.1).step()
        with torch.no_grad():  # and much more of it
            for parameter in glora.parameters(model, name):
                parameter.add_(0.5 * torch.randn_like(parameter))
        known[name] = with_weights(plain, glora.state_dict(model, name))
        assert equal(states(model.rnn, x), states(known[name], x))
        assert not equal(states(model.rnn, x), states(plain, x))
    glora.activate(model, "a")
    assert equal(states(model.rnn, x), states(known["a"], x))
    model.to(x.dtype)  # it fills its list again
    assert equal(states(model.rnn, x), states(known["a"], x))
    with glora.disabled(model):
        assert equal(states(model.rnn, x), states(plain, x))
    with glora.merged(model):
        assert type(model.rnn) is type(plain)
        assert equal(states(model.rnn, x), states(known["a"], x))
        kept = copy.deepcopy(model)
    assert equal(states(kept.rnn, x), states(known["a"], x))
    assert equal(states(model.rnn, x), states(known["a"], x))
    replica = copy.deepcopy(model)
    glora.activate(model, "b")
    assert equal(states(replica.rnn, x), states(known["a"], x))
    with tempfile.TemporaryDirectory() as folder:
        glora.save(model, folder, "b")
        loaded = glora.load(fresh, folder, strict=True)
    assert equal(states(loaded.rnn, x), states(known["b"], x))
    with quiet():
        glora.merge(replica)
    assert equal(states(replica.rnn, x), states(known["a"], x))
    assert all(a is b for a, b in zip(flat(replica.rnn), replica.rnn.parameters(), strict=True))
    glora.remove(model)
    assert same(model.state_dict(), base)
    assert equal(states(model.rnn, x), states(plain, x))
    assert all(a is b is c for a, b, c in zip(flat(model.rnn), model.rnn.parameters(), held, strict=True))


def flat(rnn: nn.RNNBase) -> list[Tensor]:
    return cast("list[Tensor]", vars(rnn)["_flat_weights"])


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_own_removal_of_one_weight_after_another(kind: Any) -> None:
    plain, x = kind(4, 3), torch.randn(3, 2, 4)
    model = glora.apply(Net(copy.deepcopy(plain)), ["first"], RANDOM, trainable=["rnn"])
    with torch.no_grad():
        for parameter in glora.parameters(model):
            parameter.add_(0.1)
    expected = states(with_weights(plain, glora.state_dict(model)), x)
    for name in [name for name, _ in plain.named_parameters()]:
        parametrize.remove_parametrizations(model.rnn, name)
        assert equal(states(model.rnn, x), expected)
    assert type(model.rnn) is kind
    assert all(a is b for a, b in zip(flat(model.rnn), model.rnn.parameters(), strict=True))


def test_a_call_that_fails_leaves_a_recurrent_module_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Net(nn.GRU(4, 3)), torch.randn(3, 2, 4)
    y = model(x)

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("glora.model.attach.guard_save_pretrained", fail)
    with pytest.raises(MemoryError):
        glora.apply(model, ["first"], LORA, trainable=["rnn"])
    assert torch.equal(model(x), y)
    assert all(a is b for a, b in zip(flat(model.rnn), model.rnn.parameters(), strict=True))


def test_a_registered_weight_of_a_recurrent_module_is_adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.GRU):
        pass

    monkeypatch.setattr("glora.matrices._registered", [])
    glora.register_matrix(Own, {"weight_ih_l0": "bias_ih_l0"}, "o i -> o i")
    rnn, x = Own(4, 3), torch.randn(3, 2, 4)
    model = glora.apply(nn.ModuleList([rnn]), ["0.weight_ih_l0"], RANDOM)
    plain = nn.GRU(4, 3)
    plain.load_state_dict({name: getattr(rnn, name) for name, _ in plain.named_parameters()})
    torch.testing.assert_close(states(rnn, x), states(plain, x))
    glora.merge(model)
    torch.testing.assert_close(states(rnn, x), states(plain, x))


def test_a_batch_for_several_adapters_is_refused() -> None:
    model = Net(nn.GRU(4, 3))
    for name in "ab":
        glora.apply(model, ["first"], LORA, trainable=["rnn"], name=name)
    with pytest.raises(RuntimeError, match="recurrent modules.*as 'rnn'"), glora.route(model, ["a", "b"], dim=1):
        pass
    with glora.route(model, ["a", "a"], dim=1):
        model(torch.randn(3, 2, 4))
