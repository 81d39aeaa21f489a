"""Invariants 1 to 6 of a single layer, over the whole space of cases."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import glora
from glora.config import FORMS
from tests.strategies import DTYPES, Case, cases, close, configs, expected, silent_apply


def weight_then_bias(layer: nn.Module) -> None:
    for name in list(layer.parametrizations):
        parametrize.remove_parametrizations(layer, name)


def bias_then_weight(layer: nn.Module) -> None:
    for name in reversed(list(layer.parametrizations)):
        parametrize.remove_parametrizations(layer, name)


MERGES: dict[str, Callable[[nn.Module], object]] = {
    "glora.merge": glora.merge,
    "weight, then bias": weight_then_bias,
    "bias, then weight": bias_then_weight,
}


@given(configs(init="identity"), cases(max_adapters=1))
def test_identity_at_the_start(config: glora.GLoRAConfig, case: Case) -> None:
    plain = case.plain()
    layer = silent_apply(case.plain(), config=config)
    assert torch.equal(layer.weight, plain.weight)
    if case.bias:
        assert torch.equal(layer.bias, plain.bias)
    elif config.create_bias and layer.bias is not None:
        assert not layer.bias.any()
    x = case.input(5)
    assert close(layer(x), plain(x).double(), ulps=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize(("path", "form"), [(p, f) for p, forms in FORMS.items() for f in forms if f != "none"])
def test_every_path_moves_a_random_start(path: str, form: str, product: str, dtype: torch.dtype) -> None:
    nothing = dict.fromkeys(FORMS, "none")
    config = glora.GLoRAConfig(**nothing | {path: form}, product=product, init="random", rank=2)
    for shape in [(1, 1), (17, 33), (33, 17)]:
        plain = nn.Linear(*shape, dtype=dtype)
        if shape == (1, 1):  # of one size: a tenth of a tiny weight is nothing beside a large bias in bfloat16
            nn.init.ones_(plain.weight)
            nn.init.ones_(plain.bias)
        layer = glora.apply(copy.deepcopy(plain), config=config)
        x = torch.randn(64, shape[0], dtype=dtype)
        assert not torch.equal(layer(x), plain(x))
        tensor, base = (layer.weight, plain.weight) if path in "AB" else (layer.bias, plain.bias)
        norm = plain.weight.double().norm() if path != "D" else plain.bias.double().norm()
        if shape != (1, 1):
            moved = (tensor.double() - base.double()).norm() / norm
            assert 0.02 < moved < 0.5  # "about a tenth": single draws of a constant or of rank 2 scatter


@given(cases())
def test_weight_and_bias_are_the_reference(case: Case) -> None:
    plain, layer = case.plain(), case.build()
    weight, bias = expected(layer, case, plain.weight.detach(), None if plain.bias is None else plain.bias.detach())
    assert layer.weight.dtype == case.dtype
    # Differences of the order of summation, at the size of the largest entry.
    assert close(layer.weight, weight, ulps=64)
    if layer.bias is not None:
        assert close(layer.bias, bias, ulps=64)
    else:
        assert not case.bias


@given(cases(), st.sampled_from(sorted(MERGES)))
def test_merged_equals_unmerged(case: Case, how: str) -> None:
    layer, x = case.build(), case.input(2, 3)
    weight, bias, y = layer.weight.detach().clone(), layer.bias, layer(x)
    with glora.merged(layer):
        assert type(layer) is nn.Linear
        assert list(layer.state_dict()) == list(case.plain().state_dict()) + ["bias"] * (
            bias is not None and not case.bias
        )
        assert torch.equal(layer.weight, weight)
        assert close(layer(x), y.double(), ulps=16)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), y)
    MERGES[how](layer)
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, weight)
    assert (layer.bias is None) == (bias is None)
    if bias is not None:
        assert torch.equal(layer.bias, bias)
    assert close(layer(x), y.double(), ulps=16)


@given(cases())
def test_half_removed_still_uses_the_frozen_weight(case: Case) -> None:
    layer = case.build()
    if set(getattr(layer, "parametrizations", {})) != {"weight", "bias"}:
        return
    weight, bias = layer.weight.detach(), layer.bias.detach()
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.bias, bias)
    clone = copy.deepcopy(layer)
    assert torch.equal(clone.bias, bias)
    assert torch.equal(clone.double().bias.to(case.dtype), bias) or case.dtype != torch.float64


@given(cases(), st.booleans())
def test_removal_gives_back_the_very_bits(case: Case, through_torch: bool) -> None:
    layer = case.plain()
    before = dict(layer.named_parameters())
    bits = {name: parameter.detach().clone() for name, parameter in before.items()}
    for i, config in enumerate(case.configs):
        silent_apply(layer, config=config, name=f"a{i}")
    layer(case.input())
    if through_torch and not any(config.create_bias for config in case.configs):
        for name in list(layer.parametrizations):
            parametrize.remove_parametrizations(layer, name, leave_parametrized=False)
    else:
        glora.remove(layer)
    assert type(layer) is nn.Linear
    assert dict(layer.named_parameters()).keys() == before.keys()
    for name, parameter in layer.named_parameters():
        assert parameter is before[name]
        assert torch.equal(parameter, bits[name])
    assert list(layer.state_dict()) == list(bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_thousand_rounds_leave_every_bit(dtype: torch.dtype) -> None:
    plain = nn.Linear(7, 5, dtype=dtype)
    layer = glora.apply(copy.deepcopy(plain), config=glora.GLoRAConfig(A="vector", B="lora", init="random"))
    with torch.no_grad():
        dict(glora.named_parameters(layer))["A.value"].fill_(-1)  # W0 vanishes from W'
    x = torch.randn(3, 7, dtype=dtype)
    y = layer(x)
    for _ in range(1000):
        with glora.merged(layer), glora.disabled(layer):
            pass
        with glora.disabled(layer):
            pass
    assert torch.equal(layer(x), y)
    with glora.disabled(layer):
        assert torch.equal(layer(x), plain(x))
    glora.remove(layer)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)


@given(cases())
def test_disabled_is_the_base_model_to_the_bit(case: Case) -> None:
    plain, layer, x = case.plain(), case.build(), case.input(4)
    y = layer(x)
    with glora.disabled(layer):
        assert torch.equal(layer(x), plain(x))
        assert set(glora.adapters(layer).values()) == {0.0}
        with glora.merged(layer):
            assert torch.equal(layer(x), plain(x))
    with glora.merged(layer), glora.disabled(layer):
        assert torch.equal(layer(x), plain(x))
        assert (layer.bias is None) == (plain.bias is None)
    assert glora.adapters(layer) == case.strengths
    assert torch.equal(layer(x), y)


@given(cases(max_adapters=3), st.randoms(use_true_random=False))
def test_adapters_add_up_in_any_order(case: Case, random: object) -> None:
    layer = case.build()
    weight = layer.weight.detach().clone()
    names = list(case.strengths)
    random.shuffle(names)
    glora.activate(layer, {name: case.strengths[name] for name in names})
    assert close(layer.weight, weight.double(), ulps=32)


@given(configs(), st.sampled_from(DTYPES))
def test_opposite_weights_of_equal_adapters_give_the_base(config: glora.GLoRAConfig, dtype: torch.dtype) -> None:
    plain = nn.Linear(9, 6, dtype=dtype)
    layer = glora.apply(glora.apply(copy.deepcopy(plain), config=config, name="a"), config=config, name="b")
    glora.load_state_dict(layer, glora.state_dict(layer, "a"), "b")
    glora.activate(layer, {"a": 1, "b": -1})
    assert close(layer.weight, plain.weight.double(), ulps=4)
    assert close(layer.bias, plain.bias.double(), ulps=4)


@given(cases())
def test_weights_are_those_of_activate_and_half_of_them_half_the_update(case: Case) -> None:
    layer = case.build()
    assert glora.adapters(layer) == case.strengths
    # In float64 the update is linear in the weights.
    if case.dtype == torch.float64:
        W0 = case.plain().weight
        whole = layer.weight - W0
        glora.activate(layer, {name: weight / 2 for name, weight in case.strengths.items()})
        assert close(2 * (layer.weight - W0), whole, ulps=64)


@given(cases(dtypes=[torch.float32, torch.bfloat16, torch.float16]), st.sampled_from([torch.bfloat16, torch.float16]))
def test_dtypes_are_the_layers_also_inside_autocast(case: Case, half: torch.dtype) -> None:
    plain, layer, x = case.plain(), case.build(), case.input(4)
    weight = layer.weight
    for parameter in (p for name in case.strengths for p in glora.parameters(layer, name)):
        assert parameter.dtype == torch.float32
    with torch.autocast("cpu", half):
        assert layer.weight.dtype == case.dtype
        assert torch.equal(layer.weight, weight)
        assert layer(x).dtype == plain(x).dtype
    assert layer(x).dtype == case.dtype


@given(cases(dtypes=[torch.float64], max_size=(5, 4)))
def test_gradients_of_every_factor(case: Case) -> None:
    layer, x = case.build(), case.input(3).requires_grad_()
    names = [(adapter, key) for adapter in case.strengths for key, _ in glora.named_parameters(layer, adapter)]
    values = [p for adapter in case.strengths for _, p in glora.named_parameters(layer, adapter)]
    prefix = {"A": "weight", "B": "weight", "C": "bias", "D": "bias", "E": "bias"}
    own = [f"parametrizations.{prefix[key[0]]}.0.{adapter}.{key}" for adapter, key in names]

    def function(x: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(own, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *values))
    arguments = (x.detach(), *(v.detach() for v in values))
    tangents = tuple(torch.randn_like(a) for a in arguments)
    forward = torch.func.jvp(function, arguments, tangents)[1]
    reverse = torch.func.jacrev(function, tuple(range(len(arguments))))(*arguments)
    along = sum((J.flatten(2) @ t.flatten() for J, t in zip(reverse, tangents, strict=True)), torch.zeros_like(forward))
    torch.testing.assert_close(forward, along)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))


@given(cases(), st.data())
def test_a_merge_that_is_not_finite_changes_nothing(case: Case, data: st.DataObject) -> None:
    model = nn.Sequential(case.build(), case.build())
    name = data.draw(st.sampled_from(list(case.strengths)))
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


def test_a_cast_that_overflows_is_not_merged() -> None:
    layer = glora.apply(nn.Linear(2, 2, dtype=torch.float16), config=glora.GLoRAConfig(A="none", B="constant"))
    with torch.no_grad():
        next(glora.parameters(layer)).fill_(1e6)  # finite in the factor's float32, not in float16
    with pytest.raises(ValueError, match=r"`weight` .* has 4 entries in torch.float16 that are not"):
        glora.merge(layer)


def test_merge_warns_of_the_inactive_adapters_that_it_drops_and_a_second_one_does_nothing() -> None:
    layer = glora.apply(glora.apply(nn.Linear(3, 2), name="a"), name="b")
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
    glora.apply(model, config=glora.GLoRAConfig(init="random"))
    glora.merge(model)
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))
    before = model[0].weight.detach().clone()
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_merged_leaves_a_pending_backward_alone() -> None:
    layer = glora.apply(nn.Linear(4, 3), config=glora.GLoRAConfig(init="random"))
    loss = layer(torch.randn(5, 4)).square().sum()
    (reference,) = torch.autograd.grad(loss, [next(glora.parameters(layer))], retain_graph=True)
    with glora.merged(layer):
        pass
    with glora.disabled(layer):
        loss.backward()  # from inside, too: no gradient is lost
    assert torch.equal(next(glora.parameters(layer)).grad, reference)


def test_what_merged_computes_is_given_back_after_an_exception_and_where_the_model_was_moved() -> None:
    layer = glora.apply(nn.Linear(4, 3), config=glora.GLoRAConfig(init="random"))
    before = {key: (value, value.clone()) for key, value in layer.state_dict(keep_vars=True).items()}
    with pytest.raises(ZeroDivisionError), glora.merged(layer), glora.merged(layer), glora.disabled(layer):
        _ = 1 / 0
    after = layer.state_dict(keep_vars=True)
    assert all(after[key] is value and torch.equal(value, bits) for key, (value, bits) in before.items())
    with glora.merged(layer):
        layer.double()
    assert {value.dtype for value in layer.state_dict().values()} == {torch.float64}


@pytest.mark.parametrize("call", ["apply", "merge", "remove", "activate", "load_state_dict", "reset_parameters"])
def test_inside_merged_adapters_cannot_be_changed(call: str) -> None:
    layer = glora.apply(nn.Linear(4, 3))
    arguments = {"apply": {"name": "b"}, "activate": {"weights": "default"}, "load_state_dict": {"state_dict": {}}}
    with glora.merged(layer), pytest.raises(RuntimeError, match="Inside glora.merged"):
        getattr(glora, call)(layer, **arguments.get(call, {}))
    assert glora.adapters(layer) == {"default": 1.0}


def test_reading_works_inside_merged() -> None:
    layer = glora.apply(nn.Linear(4, 3), config=glora.GLoRAConfig(init="random"))
    outside = glora.state_dict(layer)
    base = glora.base_state_dict(layer)
    with glora.merged(layer):
        assert glora.adapters(layer) == {"default": 1.0}
        assert all(torch.equal(v, outside[k]) for k, v in glora.state_dict(layer).items())
        assert all(torch.equal(v, base[k]) for k, v in glora.base_state_dict(layer).items())
        assert len(list(glora.parameters(layer))) == len(outside)


def test_activate_refuses_what_it_cannot_do() -> None:
    layer = glora.apply(nn.Linear(4, 3), name="a")
    with pytest.raises(KeyError, match="'b' is not an adapter of the model, which has 'a'"):
        glora.activate(layer, "b")
    for weight in (float("nan"), float("inf"), True, "1"):
        with pytest.raises(ValueError, match="finite number"):
            glora.activate(layer, {"a": weight})
    assert glora.adapters(layer) == {"a": 1.0}
    assert glora.adapters(glora.activate(layer, {})) == {"a": 0.0}


def test_only_active_factors_ask_for_gradients_and_flags_come_back() -> None:
    layer = glora.apply(glora.apply(nn.Linear(4, 3), name="a"), name="b")
    frozen = next(glora.parameters(layer, "b"))
    frozen.requires_grad_(False)  # by hand
    glora.activate(layer, "a")
    assert all(p.requires_grad for p in glora.parameters(layer, "a"))
    assert not any(p.requires_grad for p in glora.parameters(layer, "b"))
    glora.activate(layer, {"a": 0.5, "b": 0.5})
    assert all(p.requires_grad for p in glora.parameters(layer, "a"))
    assert [p.requires_grad for p in glora.parameters(layer, "b")] == [
        p is not frozen for p in glora.parameters(layer, "b")
    ]
    glora.activate(layer, {})
    assert not any(p.requires_grad for p in layer.parameters())


def test_assigning_a_computed_tensor_is_refused_by_name() -> None:
    layer = glora.apply(nn.Linear(3, 3), config=glora.GLoRAConfig.lora())
    for value in (nn.Parameter(torch.ones(3, 3)), torch.ones(3, 3)):
        with pytest.raises(RuntimeError, match=r"`weight` of this ParametrizedLinear .* glora.merge"):
            layer.weight = value
    layer.bias = nn.Parameter(torch.ones(3))  # no path touches it: plain
    assert torch.equal(layer.bias, torch.ones(3))


def test_a_tensor_that_no_path_touches_is_not_parametrized() -> None:
    assert list(glora.apply(nn.Linear(3, 3), config=glora.GLoRAConfig.lora()).parametrizations) == ["weight"]
    assert list(glora.apply(nn.Linear(3, 3), config=glora.GLoRAConfig.bitfit()).parametrizations) == ["bias"]


def test_an_attribute_error_inside_is_not_taken_for_a_missing_weight() -> None:
    layer = glora.apply(nn.Linear(3, 3))
    del layer.parametrizations.weight[0].default.A.left
    with pytest.raises(RuntimeError, match="Computing `weight` .* 'left'"):
        _ = layer.weight


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_rank_dropout_has_the_right_expectation_and_is_never_baked_in(p: float) -> None:
    config = glora.GLoRAConfig(A="lora", B="lora", C="none", rank=4, rank_dropout=p, init="random")
    layer = glora.apply(nn.Linear(6, 5), config=config)
    x = torch.randn(8, 6)
    whole = layer.eval()(x)
    weight = layer.weight
    layer.train()
    assert torch.equal(layer.weight, weight)  # whoever reads it gets the expectation
    draws = torch.stack([layer(x).detach() for _ in range(4000)])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - whole).abs() <= 5 * error + 1e-6).all()
    assert (draws.std(0) > 0).any()
    glora.merge(layer)
    assert torch.equal(layer.weight, weight)


def test_rank_dropout_drops_components_with_its_probability() -> None:
    config = glora.GLoRAConfig(
        A="none", B="lora", C="none", D="none", E="none", rank=1, rank_dropout=0.2, init="random"
    )
    layer = glora.apply(nn.Linear(1, 1), config=config)
    x, base = torch.ones(1, 1), layer.parametrizations.weight.original + layer.bias
    kept = torch.cat([layer(x) for _ in range(2000)]) - base
    assert 0.16 < (kept.abs() < 1e-6).float().mean() < 0.24
    whole = layer.eval()(x) - base
    torch.testing.assert_close(kept[kept.abs() >= 1e-6].mean(), (whole / 0.8).squeeze(), atol=1e-5, rtol=1e-4)
