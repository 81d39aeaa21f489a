"""LoRA and the other paths on nn.Embedding: rows are looked up, and W' is never made."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import glora
from glora import GLoRAConfig
from tests.helpers.strategies import configs

NO_BIAS: dict[str, Any] = {"C": "none", "D": "none", "E": "none"}
BOTH = GLoRAConfig.glora(rank=2, init="random", **NO_BIAS)


def embedding(tokens: int = 7, features: int = 3, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(tokens, features, dtype=dtype, **options))


class Sizes(TorchFunctionMode):
    """The number of rows of each matrix with as many columns as the weight that any function returns."""

    def __init__(self, features: int) -> None:
        self.features, self.rows = features, set[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.ndim == 2 and result.shape[1] == self.features:
            self.rows.add(result.shape[0])
        return result


@given(
    configs(needs="AB"),
    st.lists(st.integers(0, 6), max_size=9),
    st.sampled_from([None, 0, 3]),
    st.booleans(),
)
def test_rows_and_gradients_are_those_of_the_whole_weight(
    config: GLoRAConfig, ids: list[int], padding: int | None, freeze: bool
) -> None:
    """As nn.Embedding's own lookup of `layer.weight`, which is the whole W', with its padding_idx."""
    model, tokens = embedding(padding_idx=padding), torch.tensor(ids, dtype=torch.long)
    config = GLoRAConfig.glora(**{**vars_of(config), **NO_BIAS})
    glora.apply(model, ["0"], config, freeze=freeze)
    model[0].parametrizations.weight.original.requires_grad_(not freeze)
    wanted = F.embedding(tokens, model[0].weight, padding)
    direction = torch.randn_like(wanted)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad((wanted * direction).sum(), parameters, allow_unused=True, materialize_grads=True)
    found = model(tokens)
    torch.testing.assert_close(found, wanted)
    got = torch.autograd.grad((found * direction).sum(), parameters, allow_unused=True, materialize_grads=True)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def vars_of(config: GLoRAConfig) -> dict[str, Any]:
    return {**config.forms, "rank": config.rank, "alpha": config.alpha, "product": config.product, "init": "random"}


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_no_whole_weight_is_made(product: Any) -> None:
    model = glora.apply(embedding(1000, 8), ["0"], GLoRAConfig.glora(rank=2, init="random", product=product, **NO_BIAS))
    with Sizes(8) as sizes:
        model(torch.arange(5).view(5, 1)).sum().backward()
    assert max(sizes.rows) <= 8  # rows of these tokens, and thin factors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_rounds_once(dtype: torch.dtype, autocast: bool) -> None:
    model = glora.apply(embedding(50, 8, dtype), ["0"], BOTH)
    assert all(parameter.dtype == torch.float32 for parameter in glora.parameters(model))
    tokens = torch.arange(50).view(5, 10)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = model(tokens)
    wanted = F.embedding(tokens, model[0].weight)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_what_writes_into_the_weight_or_rescales_its_gradient_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'0' is not: its max_norm"):
        glora.apply(embedding(**options), ["0"], BOTH)


def test_each_sample_goes_through_its_own_adapter() -> None:
    model = embedding()
    for name in "ab":
        glora.apply(model, ["0"], BOTH, name=name)
    tokens, expected = torch.arange(6).view(3, 2), list[Tensor]()
    for row, chosen in zip(tokens, ({"a": 1.0}, {}, {"b": 1.0}), strict=True):
        expected.append(glora.activate(model, chosen)(row))
    with glora.route(model, ["a", None, "b"]):
        torch.testing.assert_close(model(tokens), torch.stack(expected))


def test_rank_dropout_drops_components_in_training_alone() -> None:
    config = GLoRAConfig.glora(B="lora", A="none", rank=8, init="random", rank_dropout=0.5, **NO_BIAS)
    model, tokens = glora.apply(embedding(), ["0"], config), torch.arange(7)
    assert not torch.equal(model.train()(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))


def test_paths_of_the_bias_are_left_out_with_a_word() -> None:
    with pytest.warns(UserWarning, match="1 layers have no bias"):
        model = glora.apply(embedding(), ["0"], GLoRAConfig.glora())
    assert [key for key, _ in glora.named_parameters(model)] == ["0.A.left", "0.A.right", "0.B.left", "0.B.right"]


def test_an_embedding_that_is_tied_to_the_output_layer_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="tied to"):
        glora.apply(model, ["0"], BOTH)


class Scaled(nn.Embedding):
    """As Gemma's: nn.Embedding's forward inside of a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_a_forward_of_its_own_reads_the_weight() -> None:
    model = nn.Sequential(Scaled(5, 3))
    glora.apply(model, ["0"], BOTH)
    torch.testing.assert_close(model(torch.arange(5)), model[0].weight * 2)


@pytest.mark.parametrize(
    ("targets", "reached"),
    [
        (["0"], ["0"]),
        (["0", "1"], ["0", "1"]),
        ("0", ["0"]),
        (".*", ["1"]),
        (lambda *_: True, ["1"]),
        ("all-linear", ["1"]),
        ({"0": BOTH, "1": BOTH}, ["0", "1"]),
    ],
)
def test_an_embedding_is_reached_where_it_is_named(targets: Any, reached: list[str]) -> None:
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 3))
    found = glora.plan(model, targets, None if isinstance(targets, dict) else BOTH)
    assert [layer.path for layer in found.layers] == reached


@pytest.mark.parametrize("options", [{"max_norm": 0.1}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_as_a_head_it_keeps_its_own_forward(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Embedding(5, 3, **options), nn.Linear(3, 2))
    model, tokens = copy.deepcopy(plain), torch.tensor([1, 2, 2])
    glora.apply(model, ["1"], trainable=["0"], config=glora.GLoRAConfig.glora())
    found, wanted = [net[0](tokens) for net in (model, plain)]
    assert torch.equal(found, wanted)
    found.sum().backward()
    wanted.sum().backward()
    gradient = dict(glora.named_parameters(model))["0.weight"].grad
    assert gradient is not None
    assert gradient.is_sparse is plain[0].weight.grad.is_sparse
    assert torch.equal(gradient.to_dense(), plain[0].weight.grad.to_dense())
