"""Families of models with default targets: what is reached, merging, removing, gradients."""

from __future__ import annotations

import pytest
import torch

import glora
from benchmarks.families import attach, families, inputs_of, output


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", families())
def test_a_family_trains_merges_and_comes_back(family: str) -> None:
    build, kind = families()[family]
    torch.manual_seed(0)
    model, inputs = build().eval(), inputs_of(kind)
    with torch.no_grad():
        base = output(model, inputs)
    share = glora.summary(attach(model)).coverage.share
    assert share > (0.7 if kind == "pixels" else 0.9)  # patches are embedded by a convolution, which is named or left
    adapted = output(model, inputs)
    assert not torch.allclose(adapted, base, atol=1e-5)
    adapted.square().sum().backward()
    # An expert that no token goes to has a gradient of zero; a pooler is not in the first output.
    without = {key for key, parameter in glora.named_parameters(model) if parameter.grad is None}
    assert all(key.startswith("pooler.") for key in without)
    with torch.no_grad(), glora.merged(model):
        assert torch.allclose(output(model, inputs), adapted, atol=1e-5 * float(adapted.abs().max()))
    glora.remove(model)
    with torch.no_grad():
        assert torch.equal(output(model, inputs), base)
