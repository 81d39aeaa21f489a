"""A layer that is quantised already is refused, with the way that works; merged first, it quantises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import glora
from tests.helpers.models import adapted_block, block

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def test_torchao_after_a_merge_and_not_before() -> None:
    quantization: Any = pytest.importorskip("torchao.quantization")
    x = torch.randn(3, 6)
    config = quantization.Int8WeightOnlyConfig()
    quantised = block()
    quantization.quantize_(quantised, config)
    with pytest.raises(ValueError, match="attach to a float copy of the layer, train, glora.merge, and quantise"):
        glora.apply(quantised, targets=["0", "2"])
    model = adapted_block()
    expected = model(x)
    quantization.quantize_(glora.merge(model), config)
    torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.1)
    assert type(model[0].weight) is not torch.nn.Parameter
