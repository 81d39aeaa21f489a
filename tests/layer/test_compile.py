"""Adapted layers compile like plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import glora
from glora import GLoRAConfig
from tests.helpers.calls import RANDOM, attach
from tests.helpers.kernels import KINDS
from tests.helpers.models import adapted_block, block

kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def test_twelve_equal_blocks_compile_like_plain_ones() -> None:
    def graphs(blocks: list[nn.Module]) -> int:
        torch._dynamo.reset()
        count = 0

        def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
            nonlocal count
            count += 1
            return graph.forward

        x = torch.randn(3, 6)
        for each in blocks:
            compiled = torch.compile(each, backend=backend, fullgraph=True)
            torch.testing.assert_close(compiled(x), each(x))
        return count

    plain = graphs([block() for _ in range(12)])
    assert graphs([adapted_block() for _ in range(12)]) == plain
    assert plain == 1


def test_a_weight_of_an_adapter_recompiles_nothing_and_a_set_of_adapters_once() -> None:
    torch._dynamo.reset()
    count = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        nonlocal count
        count += 1
        return graph.forward

    model, x = adapted_block(name="a"), torch.randn(3, 6)
    glora.apply(model, config=RANDOM, name="b")
    compiled = torch.compile(model, backend=backend, fullgraph=True)

    def run(weights: dict[str, float]) -> int:
        nonlocal count
        count = 0
        glora.activate(model, weights)
        torch.testing.assert_close(compiled(x), model(x))
        return count

    assert run({"a": 1.0, "b": 1.0}) == 1
    assert [run({"a": w, "b": 1 - w}) for w in (0.3, 0.5, 0.7)] == [0, 0, 0]
    assert run({"a": 1.0}) <= 1
    assert run({"a": 0.4, "b": 0.6}) == run({"a": 2.0}) == 0


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_form_is_traced_once(config: glora.GLoRAConfig, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.clear_compilation_metrics()
    layer, x = glora.apply(nn.Linear(6, 5, dtype=dtype), config=config), torch.randn(7, 6, dtype=dtype)
    glora.activate(layer, {"default": 0.7})
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    compilations = torch._dynamo.utils.get_compilation_metrics()
    assert compilations
    assert not any(compilation.restart_reasons for compilation in compilations)


def test_adapters_beyond_torchs_limit_run_uncompiled_and_right_and_a_higher_limit_compiles_each_once() -> None:
    # A graph for each set of adapters: their names are keys that it is guarded by.
    limit = torch._dynamo.config.recompile_limit
    names = [f"a{i}" for i in range(limit + 2)]
    model: nn.Module = nn.Sequential(nn.Linear(6, 5))
    for name in names:
        attach(model, GLoRAConfig.lora(rank=1, init="random"), name=name)
    x, found = torch.randn(3, 6), list[int]()
    for allowed in (limit, len(names)):
        torch._dynamo.reset()
        graphs = CompileCounter()
        with torch._dynamo.config.patch(recompile_limit=allowed):
            compiled = torch.compile(model, backend=graphs)
            for _ in range(2):
                for name in names:
                    glora.activate(model, name)
                    torch.testing.assert_close(compiled(x), model(x))
        found.append(graphs.frame_count)
    assert found == [limit, len(names)]
