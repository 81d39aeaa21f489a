"""`glora.merge`, `merged`, `delete` and `remove`: what is checked first, what can be done inside, what comes back."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import glora
from tests.helpers.calls import LORA, RANDOM, attach, quiet
from tests.helpers.models import ATTACH, TOKENS, Residual, build, three_adapters, two
from tests.helpers.state import snapshot, unchanged, values_apart
from tests.helpers.strategies import Case, cases


@pytest.mark.parametrize("how", [ATTACH[name] for name in ATTACH if name != "created bias"])
def test_merge_gives_back_keys_order_types_identities_and_flags(how: Callable[[nn.Module], object]) -> None:
    model = build()
    before = snapshot(model)
    how(model)
    y = model(TOKENS)
    with quiet():  # "two" and "inactive" drop an adapter
        glora.merge(model)
    assert values_apart(snapshot(model)) == values_apart(before)
    torch.testing.assert_close(model(TOKENS), y)


def test_a_warning_that_is_made_an_error_leaves_the_model_unmerged() -> None:
    model = build()
    two(model)
    with unchanged(model), pytest.raises(UserWarning, match="'a'"):
        glora.merge(model)


def test_merging_a_part_leaves_the_rest_adapted() -> None:
    model = build()
    attach(model)
    glora.merge(model.first)
    assert type(model.first) is nn.Linear
    assert {key.split(".")[0] for key in glora.state_dict(model)} == {"second", "third", "head", "norm"}
    assert model.first.weight.requires_grad
    assert not model.norm.weight.requires_grad


def test_merge_warns_of_the_inactive_adapters_that_it_drops_and_a_second_one_does_nothing() -> None:
    layer = glora.apply(
        glora.apply(nn.Linear(3, 2), name="a", config=glora.GLoRAConfig.glora()),
        name="b",
        config=glora.GLoRAConfig.glora(),
    )
    with pytest.warns(UserWarning, match="dropped: 'a'"):
        glora.merge(layer)
    weight = layer.weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        glora.merge(layer)
    assert layer.weight is weight


def test_the_optimizer_still_holds_the_parameters_after_merge() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    held = list(model.parameters())
    optimizer = torch.optim.SGD(held, lr=0.1)
    glora.apply(model, config=glora.GLoRAConfig.glora(init="random"))
    glora.merge(model)
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))
    before = model[0].weight.detach().clone()
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


@given(cases(), st.data())
def test_a_merge_that_is_not_finite_changes_nothing(case: Case, data: st.DataObject) -> None:
    model = nn.Sequential(case.build(), case.build())
    name = data.draw(st.sampled_from(list(case.named_weights)))
    key = data.draw(st.sampled_from([key for key in glora.state_dict(model, name) if key.startswith("1.")]))
    glora.state_dict(model, name)[key].fill_(float("nan"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    types = [type(module) for module in model]
    for attempt in (lambda: glora.merge(model), lambda: glora.merged(model).__enter__()):
        with pytest.raises(ValueError, match="'1' has .* that are not.* Nothing was merged"):
            attempt()
        assert [type(module) for module in model] == types
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(v, before[k]) or v.isnan().any() for k, v in model.state_dict().items())


@pytest.mark.parametrize(("dtype", "entry"), [(torch.float16, 6e4), (torch.float32, 3e38), (torch.float64, 1e308)])
def test_finite_entries_are_merged_where_their_sum_is_not_finite(dtype: torch.dtype, entry: float) -> None:
    layer = nn.Linear(8, 8, dtype=dtype)
    nn.init.constant_(layer.weight, entry)
    nn.init.constant_(layer.bias, -entry)
    glora.merge(glora.apply(layer, config=LORA))
    assert bool((layer.weight == torch.tensor(entry, dtype=dtype)).all())


def test_a_cast_that_overflows_is_not_merged() -> None:
    layer = glora.apply(nn.Linear(2, 2, dtype=torch.float16), config=glora.GLoRAConfig.glora(A="none", B="constant"))
    with torch.no_grad():
        next(glora.parameters(layer)).fill_(1e6)  # finite in the factor's float32, not in float16
    with pytest.raises(ValueError, match=r"`weight` .* has 4 entries in torch.float16 that are not"):
        glora.merge(layer)


# glora.merged.


def test_disabled_inside_merged_is_refused() -> None:
    layer, x = glora.apply(nn.Linear(4, 3), config=RANDOM), torch.randn(2, 4)
    with glora.merged(layer):
        y = layer(x)
        with pytest.raises(RuntimeError, match="Inside glora.merged"), glora.disabled(layer):
            pass
        assert torch.equal(layer(x), y)
    assert glora.adapters(layer) == {"default": 1.0}


def test_reading_works_inside_merged() -> None:
    layer = glora.apply(nn.Linear(4, 3), config=glora.GLoRAConfig.glora(init="random"))
    outside = glora.state_dict(layer)
    base = glora.base_state_dict(layer)
    with glora.merged(layer):
        assert glora.adapters(layer) == {"default": 1.0}
        assert all(torch.equal(v, outside[k]) for k, v in glora.state_dict(layer).items())
        assert all(torch.equal(v, base[k]) for k, v in glora.base_state_dict(layer).items())
        assert len(list(glora.parameters(layer))) == len(outside) - 1  # but the balance


def test_merged_inside_inference_mode_leaves_nothing_of_it() -> None:
    layer = glora.apply(nn.Linear(4, 3), config=RANDOM)
    with glora.merged(layer):
        pass
    context = glora.merged(layer)
    with torch.inference_mode():
        context.__enter__()
    layer(torch.randn(2, 4, requires_grad=True)).sum().backward()
    context.__exit__(None, None, None)


def test_a_model_whose_weight_is_tied_to_another_outside_of_the_adapted_part_is_not_merged() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6))
    model[1].weight = model[0].weight
    attach(model[1], RANDOM)
    table = model[0].weight.detach().clone()
    with unchanged(model), pytest.raises(ValueError, match="tied"):
        glora.merge(model)
    glora.remove(model)
    assert torch.equal(model[0].weight, table)


def test_delete_drops_one_adapter_and_the_last_one_is_remove() -> None:
    model = three_adapters()
    x = torch.randn(2, 6)
    glora.activate(model, "a")
    wanted, keys = model(x), list(glora.state_dict(model, "a"))
    with pytest.raises(KeyError):
        glora.delete(model, "z")
    glora.delete(model, "b")
    assert (set(glora.adapters(model)), list(glora.state_dict(model, "a"))) == ({"a", "c"}, keys)
    assert torch.equal(model(x), wanted)
    with glora.disabled(model):
        glora.delete(model, "a")
    assert glora.adapters(model) == {"c": 0.0}
    assert type(model.norm) is nn.LayerNorm
    glora.delete(model, "c")
    torch.manual_seed(0)
    plain = Residual()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())
