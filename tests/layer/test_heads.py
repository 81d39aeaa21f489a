"""Modules that an adapter trains as a whole are the adapter's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import glora
from tests.helpers.calls import RANDOM, attach
from tests.helpers.models import TOKENS, block, build


def test_heads_belong_to_their_adapter() -> None:
    model, x = block(), torch.randn(3, 6)
    held, bits = model[2].weight, model[2].weight.detach().clone()
    glora.apply(model, ["0"], RANDOM, trainable=[model[2]], name="a")
    model[2].weight.data.add_(1)
    glora.apply(model, ["0"], RANDOM, trainable=["2"], name="b")
    assert torch.equal(model[2].weight, bits)  # b starts from the base, not from a
    glora.activate(model, "a")
    assert torch.equal(model[2].weight, bits + 1)
    assert [k for k in glora.state_dict(model, "a") if k.startswith("2.")] == ["2.weight", "2.bias"]
    with pytest.raises(ValueError, match=r"Heads do not add up.*'2.weight' differs between 'a', 'b'"):
        glora.activate(model, {"a": 0.5, "b": 0.5})
    assert glora.adapters(model) == {"a": 1.0, "b": 0.0}
    with glora.disabled(model):
        assert torch.equal(model[2].weight, bits)
    y = model(x)
    replica = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="dropped: 'b'"):
        glora.merge(replica)
    torch.testing.assert_close(replica(x), y)
    assert torch.equal(replica[2].weight, bits + 1)
    glora.remove(model)
    assert model[2].weight is held
    assert torch.equal(held, bits)
    assert held.requires_grad


def test_a_head_trains_its_buffers_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    base = copy.deepcopy(model.state_dict())
    glora.apply(model, ["0"], trainable=["1"], config=glora.GLoRAConfig.glora())
    for _ in range(3):
        model(torch.randn(16, 4) + 5)
    assert glora.state_dict(model)["1.num_batches_tracked"] == 3
    assert all(torch.equal(v, base[k]) for k, v in glora.base_state_dict(model).items())
    glora.remove(model)
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())
    assert list(model.state_dict()) == list(base)


def test_a_heads_keys_are_its_own_and_hold_its_persistent_buffers() -> None:
    model = build()
    attach(model, targets=["first"], trainable=["norm", "head"])
    assert {key for key in glora.state_dict(model) if key.split(".")[0] in ("norm", "head")} == {
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
        "head.weight",
        "head.bias",
    }
    assert not any("parametrizations" in key for key in glora.state_dict(model))
    trained = {key for key, _ in glora.named_parameters(model)}
    assert {key for key in trained if key.split(".")[0] in ("norm", "head")} == {
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }


def test_a_head_trained_elsewhere_comes_with_its_buffers() -> None:
    source = build()
    target = copy.deepcopy(source)
    for model in (source, target):
        attach(model, targets=["first"], trainable=["norm"])
    source.train()(TOKENS)
    source.eval()
    assert glora.state_dict(source)["norm.num_batches_tracked"].item() == 1
    glora.load_state_dict(target, glora.state_dict(source))
    assert torch.equal(target(TOKENS), source(TOKENS))
