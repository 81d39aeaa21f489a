"""One adapter's factors: their keys, shapes, dtypes and start, and rank dropout."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import nn

import glora
from glora import GLoRAConfig
from tests.helpers.calls import FORMS, attach, only
from tests.helpers.models import adapted_block, block
from tests.helpers.strategies import DTYPES, Case, cases, close, configs


def expected_shapes(config: GLoRAConfig, out: int, inp: int) -> dict[str, tuple[int, ...]]:
    """Section 1 of the contract, as a table."""
    r = config.rank
    whole = {"left": (out, r), "right": (r, inp)}
    scales_inputs = {"left": (inp, r), "right": (r, inp)}
    matmul = config.product == "matmul"
    table: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
        "A": {"lora": scales_inputs if matmul else whole, "vector": {"value": (1, inp) if matmul else (out, 1)}},
        "B": {"lora": whole, "vector": {"value": (out, 1)}},
        "C": {"lora": {"left": (inp, r), "right": (r, 1)}, "vector": {"value": (inp, 1)}},
        "D": {"vector": {"value": (out,)}},
        "E": {"vector": {"value": (out,)}},
    }
    table["A"]["lora"] = table["A"]["lora"] | {"balance": (1,)}
    return {
        f"{path}.{factor}": shape
        for path, form in config.forms.items()
        if form != "none"
        for factor, shape in ({"value": (1,)} if form == "constant" else table[path][form]).items()
    }


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_keys_and_shapes_are_those_of_the_contract_for_every_form(product: Any) -> None:
    seen = 0
    for forms in itertools.product(*FORMS.values()):
        if set(forms) == {"none"}:
            continue
        choice: Any = dict(zip(FORMS, forms, strict=True))
        config = GLoRAConfig.glora(**choice, rank=2, product=product)
        layer = glora.apply(nn.Linear(3, 5), config=config)
        wanted = expected_shapes(config, 5, 3)
        assert {key: tuple(tensor.shape) for key, tensor in glora.state_dict(layer).items()} == wanted
        wanted.pop("A.balance", None)  # it does not train
        assert {key: tuple(tensor.shape) for key, tensor in glora.named_parameters(layer)} == wanted
        seen += 1
    assert seen == 4 * 4 * 3 * 3 * 3 - 1


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(dtype, torch.float64 if dtype == torch.float64 else torch.float32) for dtype in DTYPES],
)
def test_factors_have_at_least_single_precision(dtype: torch.dtype, wanted: torch.dtype) -> None:
    layer = glora.apply(nn.Linear(3, 5, dtype=dtype), config=glora.GLoRAConfig.glora())
    assert {tensor.dtype for tensor in glora.state_dict(layer).values()} == {wanted}


@given(configs(init="identity"), cases(max_adapters=1))
def test_identity_at_the_start(config: glora.GLoRAConfig, case: Case) -> None:
    plain = case.plain()
    layer = attach(case.plain(), config)
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
    config = only(**{path: form}, product=product, init="random", rank=2)
    for shape in [(1, 1), (17, 33), (33, 17)]:
        plain = nn.Linear(*shape, dtype=dtype)
        if shape == (1, 1):  # beside a large bias, a tenth of a tiny weight is lost in bfloat16
            nn.init.ones_(plain.weight)
            nn.init.ones_(plain.bias)
        layer = glora.apply(copy.deepcopy(plain), config=config)
        x = torch.randn(64, shape[0], dtype=dtype)
        assert not torch.equal(layer(x), plain(x))
        tensor, base = (layer.weight, plain.weight) if path in "AB" else (layer.bias, plain.bias)
        norm = plain.weight.double().norm() if path != "D" else plain.bias.double().norm()
        if shape != (1, 1):
            moved = (tensor.double() - base.double()).norm() / norm
            assert 0.02 < moved < 0.5  # about a tenth: draws of a constant or of rank 2 vary


def test_reset_parameters_starts_again_reproducibly() -> None:
    torch.manual_seed(7)
    model = adapted_block()
    first = {k: v.clone() for k, v in glora.state_dict(model).items()}
    torch.manual_seed(7)
    block()  # advances the generator as the first start did
    glora.reset_parameters(model)
    assert all(torch.equal(v, first[k]) for k, v in glora.state_dict(model).items())


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_rank_dropout_has_the_right_expectation_and_is_never_baked_in(p: float) -> None:
    config = glora.GLoRAConfig.glora(A="lora", B="lora", C="none", rank=4, rank_dropout=p, init="random")
    layer = glora.apply(nn.Linear(6, 5), config=config)
    x = torch.randn(8, 6)
    whole = layer.eval()(x)
    weight = layer.weight
    layer.train()
    assert torch.equal(layer.weight, weight)  # reading it gives the expectation
    draws = torch.stack([layer(x).detach() for _ in range(4000)])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - whole).abs() <= 5 * error + 1e-6).all()
    assert (draws.std(0) > 0).any()
    glora.merge(layer)
    assert torch.equal(layer.weight, weight)


def test_rank_dropout_drops_components_with_its_probability() -> None:
    config = only(B="lora", rank=1, rank_dropout=0.2, init="random")
    layer = glora.apply(nn.Linear(1, 1), config=config)
    x, base = torch.ones(1, 1), layer.parametrizations.weight.original + layer.bias
    kept = torch.cat([layer(x) for _ in range(2000)]) - base
    assert 0.16 < (kept.abs() < 1e-6).float().mean() < 0.24
    whole = layer.eval()(x) - base
    torch.testing.assert_close(kept[kept.abs() >= 1e-6].mean(), (whole / 0.8).squeeze(), atol=1e-5, rtol=1e-4)


def test_rank_dropout_is_refused_where_the_forward_is_not_called() -> None:
    config = glora.GLoRAConfig.glora(rank_dropout=0.5)
    with pytest.raises(ValueError, match="rank dropout acts in nn.Linear's"):
        glora.apply(nn.MultiheadAttention(8, 2), ["out_proj"], config)


LOW_RANK = [("A", "hadamard"), ("A", "matmul"), ("B", "hadamard"), ("C", "hadamard")]


low_rank = pytest.mark.parametrize(("path", "product"), LOW_RANK, ids=["A", "A of a matrix product", "B", "C"])


@low_rank
@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("alpha", [None, 0.05, 40.0])
def test_a_random_start_moves_by_a_tenth_whatever_the_rank_and_alpha(
    path: str, product: str, rank: int, alpha: float | None
) -> None:
    layer = glora.apply(
        nn.Linear(40, 30), config=only(**{path: "lora"}, product=product, rank=rank, alpha=alpha, init="random")
    )
    tensor = "bias" if path == "C" else "weight"
    W0 = layer.parametrizations.weight.original if tensor == "weight" else layer.weight
    moved = (getattr(layer, tensor) - layer.parametrizations[tensor].original).norm() / W0.norm()
    assert 0.03 < moved < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("path", "form"), [(path, form) for path in "BE" for form in FORMS[path][:-1]])
def test_a_random_start_moves_a_weight_of_zeros(path: str, form: str, dtype: torch.dtype) -> None:
    plain = nn.Linear(40, 30, dtype=dtype)
    norm = plain.weight.detach().float().norm()
    nn.init.zeros_(plain.weight)
    nn.init.zeros_(plain.bias)
    layer = glora.apply(plain, config=only(**{path: form}, init="random"))
    # By as much as it would move nn.Linear's own start.
    moved = (layer.weight if path == "B" else layer.bias).float().norm()
    assert 0.03 < moved / norm < 0.3


@low_rank
def test_random_factors_are_of_either_sign_and_nowhere_near_zero(path: str, product: str) -> None:
    for form in [form for form in FORMS[path] if form not in ("none", "constant")]:
        layer = glora.apply(nn.Linear(40, 30), config=only(**{path: form}, product=product, init="random"))
        for factor in glora.parameters(layer):
            assert 0.2 < (factor > 0).float().mean() < 0.8
            assert factor.abs().min() > 0.3 * factor.abs().max()


def test_random_constants_are_of_either_sign() -> None:
    for path in ("A", "B", "D", "E"):
        config: Any = only(**{path: "constant"}, init="random")
        layers = [glora.apply(nn.Linear(3, 2), config=config) for _ in range(20)]
        assert {bool(next(glora.parameters(layer)) > 0) for layer in layers} == {True, False}


@low_rank
def test_identity_starts_from_a_zero_left_and_a_kaiming_uniform_right(path: str, product: str) -> None:
    layer = glora.apply(nn.Linear(64, 48), config=only(**{path: "lora"}, product=product, rank=64))
    tensors = glora.state_dict(layer)
    left, right = tensors[f"{path}.left"], tensors[f"{path}.right"]
    assert not left.any()
    # With a = sqrt(5) the bound is 1 / sqrt(fan in), as for nn.Linear's own weight.
    bound = 1 / math.sqrt(right.shape[1])
    assert 0.9 * bound < right.abs().max() <= bound
    assert abs(right.std() / (bound / math.sqrt(3)) - 1) < 0.2
    assert (right < 0).any()
    assert (right > 0).any()
