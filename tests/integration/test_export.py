"""Every exporter gets the attached model's function, or says why not."""

from __future__ import annotations

import io
import warnings
from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glora
from glora import GLoRAConfig
from tests.helpers.models import block

CONFIGS = {
    "A elementwise": GLoRAConfig.glora(rank=2, init="random"),
    "A of a matrix product": GLoRAConfig.glora(rank=2, init="random", product="matmul"),
    "A a vector": GLoRAConfig.glora(A="vector", rank=2, init="random"),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
# 4 tokens and 100 take different kernels without gradients.
tokens = pytest.mark.parametrize("count", [4, 100])
gradients = pytest.mark.parametrize("grad", [True, False])


@pytest.fixture(autouse=True)
def exporters_warnings() -> Generator[None]:
    """What exporters say of themselves: that they are deprecated, above all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def attached(config: GLoRAConfig) -> nn.Module:
    return glora.apply(block(), config=config).eval()


def run_onnx(data: bytes, x: Tensor) -> Tensor:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(data)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@configs
@tokens
@gradients
def test_tracing_and_exporting_give_the_function(config: GLoRAConfig, count: int, grad: bool) -> None:
    model, x, other = attached(config), torch.randn(count, 6), torch.randn(count, 6)
    expected = model(other).detach()
    with torch.set_grad_enabled(grad):
        for exported in (
            torch.jit.trace(model, (x,)),
            torch.export.export(model, (x,), strict=True).module(),
            torch.export.export(model, (x,), strict=False).module(),
        ):
            torch.testing.assert_close(exported(other).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.integration
@configs
@tokens
@gradients
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_computes_the_function(config: GLoRAConfig, count: int, grad: bool, dynamo: bool) -> None:
    pytest.importorskip("onnxscript")
    model, x, other, file = attached(config), torch.randn(count, 6), torch.randn(count, 6), io.BytesIO()
    expected = model(other).detach()
    with torch.set_grad_enabled(grad):
        torch.onnx.export(model, (x,), file, dynamo=dynamo)
    torch.testing.assert_close(run_onnx(file.getvalue(), other), expected, rtol=1e-4, atol=1e-5)


def test_scripting_names_what_to_do() -> None:
    model = attached(CONFIGS["A elementwise"])
    for scripted in (model, nn.Sequential(nn.ReLU(), model)):
        with pytest.raises(RuntimeError, match="torch.jit.script cannot.*glora.merge"):
            torch.jit.script(scripted)
    x = torch.randn(3, 6)
    glora.merge(model)
    assert torch.equal(torch.jit.script(model)(x), model(x))
