"""A sum of adapters computes what they compute together, attached, merged, saved and loaded."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import glora
from tests.helpers.calls import LORA, RANDOM, attach, only
from tests.helpers.kinds import KINDS
from tests.helpers.models import TOKENS, build, three_adapters, two_adapters
from tests.helpers.state import clones, same, unchanged
from tests.helpers.strategies import Case, cases, close

DOUBLES = [torch.float64, torch.float32]


def has_a_sum(case: Case) -> bool:
    """Whether one A is the sum of the case's."""
    configs = [config for config in case.configs if config.A != "none"]
    if len({config.product for config in configs if config.A != "constant"}) > 1:
        return False
    matmul = any(config.product == "matmul" for config in configs if config.A != "constant")
    forms = {config.A for config in configs}
    return not (matmul and "lora" in forms and len(forms) > 1)


@given(cases(dtypes=DOUBLES))
def test_a_sum_is_what_acts_together_attached_merged_saved_and_loaded(tmp_path_factory: Any, case: Case) -> None:
    assume(has_a_sum(case))
    layer, x = case.build(), case.input()
    together, weight, bias = layer(x), layer.weight, layer.bias
    names = list(glora.adapters(layer))
    assert glora.combine(layer, case.named_weights, name="sum") is layer
    assert glora.adapters(layer) == {**dict.fromkeys(names, 0.0), "sum": 1.0}
    for computed, wanted in ((layer(x), together), (layer.weight, weight)):
        assert close(computed, wanted, ulps=64)
    assert bias is None or close(layer.bias, bias, ulps=64)
    folder = tmp_path_factory.mktemp("adapter")
    glora.save(layer, folder, "sum")
    assert close(glora.load(case.plain(), folder, strict=True)(x), together, ulps=64)
    for name in names:
        glora.delete(layer, name)
    assert close(glora.merge(layer)(x), together, ulps=64)


@given(cases(dtypes=DOUBLES, min_adapters=2))
def test_what_no_adapter_is_the_sum_of_is_refused_by_name(case: Case) -> None:
    assume(not has_a_sum(case))
    layer = case.build()
    with unchanged(layer), pytest.raises(ValueError, match=r"one A in each layer.* A of "):
        glora.combine(layer, case.named_weights, name="sum")


@given(cases(dtypes=DOUBLES), st.integers(1, 6))
def test_a_rank_cuts_to_the_nearest_and_tells_the_error(capsys: Any, case: Case, rank: int) -> None:
    assume(has_a_sum(case))
    layer = case.build()
    glora.combine(layer, case.named_weights, name="exact")
    exact, tensors = glora.state_dict(layer, "exact"), None
    capsys.readouterr()
    glora.combine(layer, case.named_weights, name="cut", rank=rank)
    rows = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:])
    tensors = glora.state_dict(layer, "cut")
    low_rank = [key[0] for key in exact if key.endswith("left")]
    assert set(rows) == set(low_rank)
    for path in low_rank:
        whole = (exact[f"{path}.left"] @ exact[f"{path}.right"]).double()
        found = (tensors[f"{path}.left"] @ tensors[f"{path}.right"]).double()
        assert tensors[f"{path}.left"].shape[-1] <= rank
        left_out = torch.linalg.svdvals(whole)[rank:].norm()
        assert (whole - found).norm() == pytest.approx(left_out.item(), abs=1e-5 * whole.norm().item())
        assert float(rows[path]) == pytest.approx((left_out / whole.norm()).item(), abs=1e-5, rel=1e-2)
    for key in exact:
        assert key[0] in low_rank or torch.equal(exact[key], tensors[key])


def test_ranks_add_up_and_a_rank_that_is_large_enough_cuts_nothing(capsys: Any) -> None:
    layer = nn.Linear(8, 9)
    for name, rank in (("a", 2), ("b", 3)):
        attach(layer, glora.GLoRAConfig.lora(rank=rank, alpha=1, init="random"), name=name)
    glora.combine(layer, {"a": 2, "b": -1.0}, name="sum")
    assert glora.state_dict(layer, "sum")["B.left"].shape == (9, 5)
    glora.combine(layer, {"a": 2, "b": -1.0}, name="same", rank=5)
    assert "B     " in capsys.readouterr().out
    for key, tensor in glora.state_dict(layer, "sum").items():
        assert torch.equal(glora.state_dict(layer, "same")[key], tensor)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_matrix_adds_up(kind: Any) -> None:
    model, x = kind.build().double().eval(), kind.input()
    for name, config in (("a", RANDOM), ("b", only(A="constant", B="vector", E="constant", init="random"))):
        attach(model, config, targets=[kind.path], name=name)
    glora.activate(model, {"a": 0.7, "b": -2.0})
    together = kind.call(model, x)
    glora.combine(model, {"a": 0.7, "b": -2.0}, name="sum")
    torch.testing.assert_close(kind.call(model, x), together)


def test_layers_that_one_adapter_has_alone_and_created_biases() -> None:
    model, x = build(), TOKENS
    attach(model, replace(RANDOM, create_bias=True), targets=["first", "second"], name="a")
    attach(model, only(B="lora", rank=1, alpha=3, init="random"), targets=["second", "third"], name="b")
    glora.activate(model, {"a": 0.5, "b": 2.0})
    together = model(x)
    glora.combine(model, {"a": 0.5, "b": 2.0}, name="sum")
    torch.testing.assert_close(model(x), together)
    glora.delete(glora.delete(model, "a"), "b")
    torch.testing.assert_close(model(x), together)
    layers = {key.rpartition(".")[0][:-2] for key in glora.state_dict(model) if not key.startswith("norm.")}
    assert layers == {"first", "second", "third"}


def test_heads_are_taken_where_they_are_equal_and_refused_where_they_differ() -> None:
    model = two_adapters()
    with unchanged(model), pytest.raises(ValueError, match="Heads do not add up"):
        glora.combine(model, {"a": 1.0, "b": 1.0}, name="sum")
    glora.load_state_dict(model, glora.state_dict(model, "a"), "b", strict=False)
    with torch.no_grad():
        for key, value in glora.state_dict(model, "b").items():
            if key.startswith("norm."):
                value.copy_(glora.base_state_dict(model)[key])
    glora.activate(model, {"a": 1.0, "b": 0.5})
    x = torch.randn(3, 6)
    together = model(x)
    glora.combine(model, {"a": 1.0, "b": 0.5}, name="sum")
    torch.testing.assert_close(model(x), together)
    assert "head.weight" in glora.state_dict(model, "sum")


def test_the_sum_of_one_with_its_head_trains_and_is_a_copy() -> None:
    model = three_adapters()
    before = {name: clones(glora.state_dict(model, name)) for name in "abc"}
    glora.combine(model, {"b": 0.5, "a": 0}, name="alone")
    trained = dict(glora.named_parameters(model, "alone"))
    assert all(parameter.requires_grad for parameter in trained.values())
    x = torch.randn(3, 6)
    model(x).square().mean().backward()
    assert all(parameter.grad is not None for key, parameter in trained.items() if key.startswith("up"))
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(1)
    glora.delete(model, "alone")
    assert set(glora.adapters(model)) == {"a", "b", "c"}
    assert all(same(before[name], glora.state_dict(model, name)) for name in "abc")


@pytest.mark.parametrize(
    ("weights", "options", "error", "match"),
    [
        ({"a": 1.0, "d": 1.0}, {}, KeyError, "'d' is not an adapter"),
        ({"a": float("nan")}, {}, ValueError, "finite number"),
        ({"a": 0.0}, {}, ValueError, "whose weight is not 0"),
        ({}, {}, ValueError, "whose weight is not 0"),
        ("a", {}, ValueError, "mapping from name to weight"),
        ({"c": 1.0}, {"name": "a"}, ValueError, "new to the model"),
        ({"c": 1.0}, {"name": "x.y"}, ValueError, "without dots"),
        ({"c": 1.0}, {"rank": 0}, ValueError, "rank must be an int"),
    ],
)
def test_what_cannot_be_summed_is_refused_and_changes_nothing(
    weights: Any, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = three_adapters()
    with unchanged(model), pytest.raises(error, match=match):
        glora.combine(model, weights, **{"name": "sum", **options})


def test_inside_merged_and_on_the_meta_device_it_is_refused() -> None:
    model = attach(build(), LORA, name="a")
    with glora.merged(model), pytest.raises(RuntimeError, match=r"glora\.merged"):
        glora.combine(model, {"a": 1.0}, name="sum")
    bare = copy.deepcopy(model).to("meta")
    with unchanged(bare), pytest.raises(ValueError, match="memory"):
        glora.combine(bare, {"a": 1.0}, name="sum")
