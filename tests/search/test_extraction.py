"""An extracted choice is an ordinary adapter, with the supernet's outputs and the chosen parameters alone."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from glora import GLoRAConfig
from glora.search import Space, choose, extract
from glora.search.choices import layers_of
from tests.helpers.calls import RANDOM, attach
from tests.helpers.kinds import experts
from tests.helpers.search import any_choice, block, spaces, supernet
from tests.helpers.state import same_outputs, unchanged
from tests.helpers.strategies import close


@given(space=spaces(), seed=st.integers(0, 2**16), bias=st.booleans())
def test_outputs_parameters_and_shapes(space: Space, seed: int, bias: bool) -> None:
    torch.manual_seed(seed)
    model, plain, x = supernet(block(bias), space), block(bias), torch.randn(3, 6)
    targets = any_choice(model, seed)
    layers = layers_of(model)
    counted = sum(layers[path].count(config) for path, config in targets.items())
    y = choose(model, targets).eval()(x)
    targets = {path: config for path, config in targets.items() if config.paths}
    extract(model, targets)
    assert close(model(x), y.double())
    assert sum(p.numel() for p in glora.parameters(model)) == counted
    ordinary = glora.apply(plain, targets)
    assert glora.plan(block(bias), targets).parameters == counted
    shapes = {key: tensor.shape for key, tensor in glora.state_dict(ordinary).items()}
    assert {key: tensor.shape for key, tensor in glora.state_dict(model).items()} == shapes
    assert [type(m) for m in model.modules()] == [type(m) for m in ordinary.modules()]
    strides = {key: tensor.stride() for key, tensor in glora.state_dict(ordinary).items()}
    assert {key: tensor.stride() for key, tensor in glora.state_dict(model).items()} == strides


@given(space=spaces(), seed=st.integers(0, 2**16), transposed=st.booleans(), bias=st.booleans())
def test_experts_hand_out_what_an_ordinary_adapter_of_theirs_holds(
    space: Space, seed: int, transposed: bool, bias: bool
) -> None:
    build = experts(transposed, bias)
    model, ordinary, x = supernet(build(), space), build(), torch.randn(5, 4)
    targets = any_choice(model, seed)
    y = choose(model, targets).eval()(x)
    targets = {path: config for path, config in targets.items() if config.paths}
    extract(model, targets)
    assert close(model(x), y.double())
    assert close(glora.merge(copy.deepcopy(model))(x), y.double(), ulps=100)
    shapes = {key: tensor.shape for key, tensor in glora.state_dict(glora.apply(ordinary, targets)).items()}
    assert {key: tensor.shape for key, tensor in glora.state_dict(model).items()} == shapes


TARGETS = {"0": GLoRAConfig.lora(rank=2), "2": GLoRAConfig.glora(A="none", B="vector", C="none", E="none", rank=2)}


def test_it_saves_merges_and_trains(tmp_path: Path) -> None:
    model, x = supernet(block()), torch.randn(3, 6)
    y = extract(model, TARGETS)(x)
    glora.save(model, tmp_path)
    base = block()
    base.load_state_dict(glora.base_state_dict(model))
    assert same_outputs(glora.load(base, tmp_path)(x), y)
    model(x).sum().backward()
    assert all(p.grad is not None for p in glora.parameters(model))
    assert torch.allclose(glora.merge(model)(x), y, atol=1e-6)
    assert type(model[0]) is nn.Linear


def test_it_owns_its_tensors_and_leaves_no_others() -> None:
    model = supernet(block())
    twin = copy.deepcopy(model)
    before = {id(p) for p in model.parameters()}
    base = {id(p) for key, p in model.named_parameters() if key.endswith("original")}
    extract(model, TARGETS)
    assert {id(p) for p in model.parameters()} & before == base
    for key, tensor in glora.state_dict(model).items():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), key
    assert extract(twin, {"2": TARGETS["2"]})[0] is twin[0]
    assert type(twin[0]) is nn.Linear


def test_others_heads_flags_and_weights_stay() -> None:
    model, x = attach(nn.Sequential(*block(), nn.Linear(6, 2)), RANDOM, targets=["0"], name="other"), torch.randn(3, 6)
    supernet(model, targets=["0", "2"], trainable=["3"], name="net")
    glora.activate(model, {"net": 2.0})
    choose(model, TARGETS)
    heads = [p for key, p in glora.named_parameters(model, "net") if key.startswith("3.")]
    y = model(x)
    extract(model, TARGETS)
    assert glora.adapters(model) == {"other": 0.0, "net": 2.0}
    assert torch.allclose(model(x), y, atol=1e-6)
    after = [p for key, p in glora.named_parameters(model, "net") if key.startswith("3.")]
    assert all(a is b for a, b in zip(heads, after, strict=True))
    glora.delete(model, "other")
    assert sum(p.numel() for p in glora.parameters(model, "net")) == glora.plan(block(), TARGETS).parameters + 14
    glora.remove(model)
    assert all(p.requires_grad for p in model.parameters())


def test_an_inactive_one_stays_inactive() -> None:
    model = supernet(block(), name="net")
    glora.activate(model, {})
    extract(model, TARGETS)
    assert not any(p.requires_grad for p in glora.parameters(model))
    glora.activate(model, "net")
    assert all(p.requires_grad for p in glora.parameters(model))


def test_a_choice_of_nothing_is_refused() -> None:
    model = supernet(block())
    with unchanged(model), pytest.raises(ValueError, match="every path of this one is none"):
        extract(model, {})


def test_cut_off_it_has_changed_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = supernet(block()).eval(), torch.randn(3, 6)
    y = model(x)

    def cut_off(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["glora.search.supernet"], "unregister", cut_off)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        extract(model, {"2": TARGETS["2"]})
    assert torch.equal(model(x), y)


def test_a_choice_of_a_config_with_a_balance_is_one_without() -> None:
    """A supernet has none."""
    model = glora.search.supernet(nn.Sequential(nn.Linear(12, 8)), "all-linear", glora.search.Space(ranks=[2, 4]))
    chosen = {"0": glora.GLoRAConfig.glora(rank=2)}
    glora.search.choose(model, chosen)
    wanted = model[0].weight.detach().clone()
    glora.search.extract(model, chosen)
    assert torch.equal(model[0].weight, wanted)
