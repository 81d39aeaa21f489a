"""Copies are strangers, also inside torch's cache."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import glora
from tests.helpers.calls import RANDOM, remove_with_torch
from tests.helpers.models import adapted_block
from tests.helpers.state import same, with_output

CHANGES = {
    "merge": glora.merge,
    "remove": glora.remove,
    "activate": lambda model: glora.activate(model, {}),
    "apply": lambda model: glora.apply(model, config=RANDOM, name="b"),
    "torch's removal": lambda model: remove_with_torch(model[0], "weight", "bias"),
    "train": lambda model: [p.data.add_(1) for p in glora.parameters(model)],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("copied", ["deepcopy", "ema"])
@pytest.mark.parametrize("cached", [False, True])
def test_what_is_done_to_a_copy_leaves_the_original_alone_and_the_other_way(
    change: str, copied: str, cached: bool
) -> None:
    x = torch.randn(3, 6)
    for change_copy in (True, False):
        model = adapted_block()
        replica = copy.deepcopy(model) if copied == "deepcopy" else AveragedModel(model).module
        changed, kept = (replica, model) if change_copy else (model, replica)
        before = with_output(kept, x)
        if cached:
            with parametrize.cached():
                kept(x)
                changed(x)
                CHANGES[change](changed)
                # Inside the cache W' is computed whole, which rounds differently.
                torch.testing.assert_close(kept(x), before["its output"])
        else:
            CHANGES[change](changed)
        assert same(with_output(kept, x), before)


def test_a_deep_copy_inside_cached_reads_its_own_tensors() -> None:
    model, x = adapted_block(), torch.randn(3, 6)
    with parametrize.cached():
        first = model(x)
        replica = copy.deepcopy(model)
        for parameter in glora.parameters(replica):
            parameter.data.mul_(2)
        assert not torch.equal(replica(x), first)
        assert torch.equal(model(x), first)


def test_cached_sees_a_switch_of_adapters() -> None:
    layer, x = glora.apply(nn.Linear(4, 3), config=RANDOM, name="a"), torch.randn(2, 4)
    glora.apply(layer, config=RANDOM, name="b")
    alone = {name: glora.activate(layer, name)(x) for name in ("a", "b")}
    with parametrize.cached():
        for name in ("a", "b", "a"):
            glora.activate(layer, name)
            torch.testing.assert_close(layer(x), alone[name])
        with glora.disabled(layer):
            assert not torch.allclose(layer(x), alone["a"])
        glora.load_state_dict(layer, {k: 2 * v for k, v in glora.state_dict(layer, "a").items()}, "a")
        assert not torch.allclose(layer(x), alone["a"])


def test_what_is_loaded_is_seen_under_a_cache() -> None:
    layer = glora.apply(nn.Linear(3, 5), config=RANDOM)
    with parametrize.cached():
        before = layer.weight.clone()
        glora.load_state_dict(layer, {key: 0 * tensor for key, tensor in glora.state_dict(layer).items()})
        assert not torch.equal(layer.weight, before)
        assert torch.equal(layer.weight, layer.parametrizations.weight.original)


def test_an_averaged_model_follows_the_adapter() -> None:
    model, x = adapted_block(), torch.randn(3, 6)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)  # the first one copies
    for parameter in glora.parameters(model):
        parameter.data.add_(1.0)
    averaged.update_parameters(model)
    for (key, own), (other_key, mean) in zip(
        glora.state_dict(model).items(), glora.state_dict(averaged).items(), strict=True
    ):
        assert key == other_key  # no `module.`
        torch.testing.assert_close(mean, own if key.endswith("balance") else own - 0.5)  # which does not train
    y = averaged(x)
    glora.merge(averaged)
    torch.testing.assert_close(averaged(x), y)
    assert type(averaged.module[0]) is nn.Linear
    assert type(model[0]) is not nn.Linear
