"""The class that adapted layers share: its properties, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import abc
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import glora
from tests.helpers.calls import RANDOM
from tests.helpers.models import adapted_block


def test_layers_of_one_base_class_share_one_class_and_give_it_back() -> None:
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), Mine(3, 3), Mine(3, 3))
    glora.apply(model, config=RANDOM)
    assert type(model[0]) is type(model[1])
    assert type(model[2]) is type(model[3])
    assert isinstance(model[2], Mine)
    assert type(model[0]).__name__ == "ParametrizedLinear"
    assert parametrize.type_before_parametrizations(model[2]) is Mine
    glora.remove(model[0])
    assert type(model[0]) is nn.Linear
    assert model[1].weight.shape == (3, 3)  # the property is still there for the others
    glora.merge(model)
    assert [type(module) for module in model] == [nn.Linear, nn.Linear, Mine, Mine]


def test_a_base_class_with_a_metaclass() -> None:
    class Abstract(nn.Linear, abc.ABC):
        pass

    model = glora.apply(nn.Sequential(nn.Linear(4, 4), Abstract(4, 4)), config=RANDOM)
    y = model(torch.ones(1, 4))
    glora.merge(model)
    assert type(model[1]) is Abstract
    torch.testing.assert_close(model(torch.ones(1, 4)), y)


def test_a_class_that_cannot_be_extended_is_found_out_before_anything_changes() -> None:
    class Final(nn.Linear):
        def __init_subclass__(cls, **_: object) -> None:
            raise TypeError("final")

    model = nn.Sequential(nn.Linear(4, 4), Final(4, 4))
    with pytest.raises(TypeError, match="final"):
        glora.apply(model, config=glora.GLoRAConfig.glora())
    assert type(model[0]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


def test_a_deleted_model_is_freed_at_once() -> None:
    gc.collect()
    gc.disable()
    try:
        model = adapted_block()
        model(torch.randn(2, 6)).sum().backward()
        layer = weakref.ref(model[0])
        del model
        assert layer() is None
    finally:
        gc.enable()


def test_assigning_a_computed_tensor_is_refused_by_name() -> None:
    layer = glora.apply(nn.Linear(3, 3), config=glora.GLoRAConfig.lora())
    for value in (nn.Parameter(torch.ones(3, 3)), torch.ones(3, 3)):
        with pytest.raises(RuntimeError, match=r"`weight` of this ParametrizedLinear .* glora.merge"):
            layer.weight = value
    layer.bias = nn.Parameter(torch.ones(3))  # no path touches it: plain
    assert torch.equal(layer.bias, torch.ones(3))


def test_a_name_that_is_parametrized_in_one_module_may_be_anything_in_another() -> None:
    class Norm(nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.bias = nn.Parameter(torch.zeros(4)) if bias else None

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight if self.bias is None else x * self.weight + self.bias

    model = nn.Sequential(nn.Linear(4, 4), Norm(True), Norm(False))
    glora.apply(model, ["0"], RANDOM, trainable=["1", "2"])
    assert model(torch.randn(2, 4)).shape == (2, 4)
    model[2].bias = 3
    assert model[2].bias == 3
    del model[2].bias
    assert not hasattr(model[2], "bias")
    glora.merge(model)


def test_a_transformer_encoder_adapts_whole() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 8)
    glora.apply(encoder, config=RANDOM)
    y = encoder(x)
    assert len(glora.plan(encoder, config=RANDOM, name="b").layers) == 8
    glora.merge(encoder)
    torch.testing.assert_close(encoder(x), y)
