"""W' in blocks of rows: its operator in a compiled graph, and what it saves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import glora
from tests.helpers.calls import FORMS, attach, factors_of, only
from tests.helpers.kernels import KINDS

kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def test_compiled_with_any_forms_of_several_adapters_on_tensors_that_do_not_all_train() -> None:
    layer: nn.Module = nn.Linear(6, 5)
    for i, B in enumerate(FORMS["B"]):
        attach(layer, only(A="lora", B=B, C="vector", E="vector", rank=1 + i, init="random"), name=f"a{i}")
    glora.activate(layer, {f"a{i}": 0.5 + i for i in range(4)})
    x = torch.randn(7, 6)
    for asking in ("all", "x", "factors", "biases"):
        torch._dynamo.reset()
        x.requires_grad_(asking in ("all", "x"))
        for name in glora.adapters(layer):
            for key, factor in glora.named_parameters(layer, name):
                factor.requires_grad_(asking in ("all", "factors") or (asking == "biases" and key[0] in "CE"))
        sources = [tensor for tensor in (x, *factors_of(layer)) if tensor.requires_grad]
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        found, wanted = (torch.autograd.grad(run(x).cos().sum(), sources) for run in (compiled, layer))
        torch.testing.assert_close(found, wanted)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_frozen_factors_let_the_input_be_written_over(dtype: torch.dtype, config: glora.GLoRAConfig) -> None:
    layer = attach(nn.Linear(6, 6, dtype=dtype), config).requires_grad_(False)
    x = torch.randn(60, 6, dtype=dtype, requires_grad=True)

    def residual(inplace: bool) -> Tensor:
        h = x * 1
        y = layer(h)
        h = h.add_(y) if inplace else h + y
        return torch.autograd.grad(h.float().square().sum(), x)[0]

    assert torch.equal(residual(True), residual(False))
