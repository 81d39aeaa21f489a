"""Reading a tensor of an adapted module, whoever else parametrizes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import glora
from glora.layer.parametrization import Weight
from tests.helpers.calls import RANDOM, only
from tests.helpers.kinds import KINDS
from tests.helpers.models import adapted_block


def test_an_attribute_error_inside_is_not_taken_for_a_missing_weight() -> None:
    layer = glora.apply(nn.Linear(3, 3), config=glora.GLoRAConfig.glora())
    del layer.get_submodule("parametrizations.weight.0.default.A").left
    with pytest.raises(RuntimeError, match="Computing `weight` .* 'left'"):
        _ = layer.weight


def test_multihead_attention_reads_the_adapted_output_projection() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    plain = attention(x, x, x)[0]
    glora.apply(attention, targets=["out_proj"], config=RANDOM)
    adapted = attention(x, x, x)[0]
    assert not torch.allclose(adapted, plain)
    with torch.no_grad():
        torch.testing.assert_close(attention(x, x, x)[0], adapted)  # torch's fast path
    glora.merge(attention)
    torch.testing.assert_close(attention(x, x, x)[0], adapted)


def test_another_parametrization_on_top_makes_merge_refuse() -> None:
    class Double(nn.Module):
        def forward(self, W: Tensor) -> Tensor:
            return 2 * W

    model = adapted_block()
    weight = model[2].weight
    parametrize.register_parametrization(model[2], "weight", Double())
    assert torch.equal(model[2].weight, 2 * weight)
    for call in (glora.merge, glora.remove, lambda m: glora.merged(m).__enter__()):
        with pytest.raises(RuntimeError, match=r"`weight` of '2' is parametrized by Double too"):
            call(model)
    assert type(model[0]).__name__ == "ParametrizedLinear"
    parametrize.remove_parametrizations(model[2], "weight")
    assert torch.equal(model[2].weight, 2 * weight)


def test_another_parametrization_beside_ours_is_computed_by_its_own_rule() -> None:
    class Double(nn.Module):
        def forward(self, b: Tensor) -> Tensor:
            return 2 * b

    layer, other = (glora.apply(nn.Linear(3, 3), config=glora.GLoRAConfig.lora()) for _ in range(2))
    bias = layer.bias.detach().clone()
    parametrize.register_parametrization(layer, "bias", Double())
    assert torch.equal(layer.bias, 2 * bias)
    assert other.bias.shape == (3,)  # the shared class serves both
    parametrize.remove_parametrizations(layer, "bias")
    glora.merge(layer)
    assert torch.equal(layer.bias, 2 * bias)


def test_a_module_reads_its_tensors_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = next(kind for kind in KINDS if "experts" in str(kind))
    config = only(A="lora", B="lora", init="random")
    model = glora.apply(kind.build().double(), [kind.path], config)
    counted: list[str] = []
    forward: Callable[..., Tensor] = Weight.forward
    monkeypatch.setattr(Weight, "forward", lambda self, *rest: counted.append("read") or forward(self, *rest))
    kind.call(model, kind.input())
    assert len(counted) == 1
