"""fully_shard: adapters come off a sharded model for good, merged or removed, and it goes on as a plain sharded one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import glora
from glora import GLoRAConfig
from tests.helpers.calls import RANDOM
from tests.helpers.internals import fully_sharded_groups
from tests.helpers.kinds import KINDS
from tests.helpers.models import Residual
from tests.helpers.ranks import on_two_ranks, whole

pytestmark = pytest.mark.integration

CONFIGS = {
    "default": RANDOM,
    "vectors": GLoRAConfig.glora(A="vector", B="vector", D="constant", E="constant", init="random"),
    "matmul": GLoRAConfig.glora(product="matmul", rank=2, alpha=3.0, init="random"),
    "created bias": GLoRAConfig.glora(A="none", rank=2, C="lora", create_bias=True, init="random"),
    "bias alone": GLoRAConfig.glora(A="none", B="none", init="random"),
}


def net(config: GLoRAConfig = RANDOM, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = Residual().to(dtype)
    glora.apply(model, ["up"], RANDOM, name="other")
    return glora.apply(model, ["up", "down"], config, trainable=["head", "norm"])


def shard(model: Any, *, leaves: bool) -> Any:
    """Together in the root and in one of the adapted layers, or all in the root alone."""
    mesh = init_device_mesh("cpu", (2,))
    for module in (model.up, model.norm, model) if leaves else (model,):
        fully_shard(module, mesh=mesh)
    return model


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    torch.testing.assert_close(whole(found), expected, rtol=1e-6, atol=1e-7)


def step(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(x).square().mean().backward()
    optimizer.step()


def merging(_: int) -> None:
    warnings.simplefilter("ignore")
    x = torch.randn(4, 6)
    for config in CONFIGS.values():
        for leaves in (False, True):
            model, alone = shard(net(config), leaves=leaves), net(config)
            step(model, x)
            step(alone, x)
            with torch.no_grad():
                before = model(x)  # and the root stays whole
            assert glora.merge(model) is model
            glora.merge(alone)
            close(model.state_dict(), alone.state_dict())
            assert [type(m).__name__.replace("FSDP", "") for m in model.modules()] == [
                type(m).__name__ for m in alone.modules()
            ]
            # Factors are gathered no more.
            managed = [record for group in fully_sharded_groups(model) for record in group.fsdp_params]
            assert len(managed) == len(list(model.parameters()))
            with torch.no_grad():
                torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
            assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in alone.parameters()]
            close(model.state_dict(), alone.state_dict())
            step(model, x)
            step(alone, x)
            torch.testing.assert_close(whole(model.state_dict()), alone.state_dict(), rtol=1e-4, atol=1e-5)


def test_a_merged_model_is_that_of_one_process_and_trains_on() -> None:
    on_two_ranks(merging)


def in_half_precision(_: int) -> None:
    warnings.simplefilter("ignore")
    for config in CONFIGS.values():
        for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)):
            sharded = net(config, torch.bfloat16)
            mesh = init_device_mesh("cpu", (2,))
            for module in (sharded.norm, sharded.head, sharded):  # fully_shard takes one dtype of what trains together
                fully_shard(module, mesh=mesh, mp_policy=policy)
            with torch.no_grad():
                sharded(torch.randn(4, 6, dtype=torch.bfloat16))
            glora.merge(sharded)
            expected = glora.merge(net(config, torch.bfloat16))
            for key, tensor in whole(sharded.state_dict()).items():
                assert torch.equal(tensor, expected.state_dict()[key])
            step(sharded, torch.randn(4, 6, dtype=torch.bfloat16))  # of the base, whose dtype is another
            assert all(p.grad is not None for p in sharded.parameters() if p.requires_grad)


def test_a_merge_in_half_precision_rounds_once() -> None:
    on_two_ranks(in_half_precision)


def kinds(_: int) -> None:
    warnings.simplefilter("ignore")
    config = GLoRAConfig.glora(rank=2, init="random")
    for kind in KINDS:
        found: list[Any] = []
        for divided in (True, False):
            torch.manual_seed(0)
            model = glora.apply(kind.build(), [kind.path], config)
            if divided:
                fully_shard(kind.module(model), mesh=init_device_mesh("cpu", (2,)))
            found.append(glora.merge(model))
        close(found[0].state_dict(), found[1].state_dict())
        x = kind.input().float()
        torch.testing.assert_close(kind.call(found[0], x), kind.call(found[1], x))


def test_a_merge_of_every_kind_of_module() -> None:
    on_two_ranks(kinds)


def removing(_: int) -> None:
    warnings.simplefilter("ignore")
    x = torch.randn(4, 6)
    torch.manual_seed(0)
    base = Residual()
    for leaves in (False, True):
        model = shard(net(CONFIGS["created bias"]), leaves=leaves)
        step(model, x)
        glora.delete(model, "default")
        assert glora.adapters(model) == {"other": 0.0}
        torch.testing.assert_close(model(x), base(x), rtol=1e-5, atol=1e-6)
        glora.activate(model, "other")
        step(model, x)
        glora.remove(model)
        for key, tensor in whole(model.state_dict()).items():
            assert torch.equal(tensor, base.state_dict()[key])
        torch.testing.assert_close(model(x), base(x), rtol=1e-5, atol=1e-6)


def test_a_removal_gives_the_base_back() -> None:
    on_two_ranks(removing)


def refusals(rank: int) -> None:
    warnings.simplefilter("ignore")
    model = shard(net(), leaves=False)
    before = whole(model.state_dict())

    def refused(call: Callable[[], object], kind: type[Exception], match: str) -> None:
        with pytest.raises(kind, match=match):
            call()
        found = whole(model.state_dict())
        assert list(found) == list(before)
        assert all(torch.equal(found[key], before[key]) for key in before)

    # The part's records are with the model that fully_shard was called on.
    refused(lambda: glora.merge(model.up), RuntimeError, "whole model that it was called on")
    refused(lambda: glora.remove(model.up), RuntimeError, "whole model that it was called on")
    refused(lambda: glora.merged(model).__enter__(), RuntimeError, "Inside glora.merged.*glora.merge merges sharded")
    # One entry of one rank is not finite: all ranks refuse.
    with torch.no_grad():
        part = model.down.parametrizations.weight.original.to_local()
        if rank == 1:
            part[-1, -1] = float("inf")
    before = whole(model.state_dict())
    refused(lambda: glora.merge(model), ValueError, "`weight` of 'down' has 1 entries")
    assert glora.adapters(model) == {"other": 0.0, "default": 1.0}


def test_what_is_refused_changes_nothing() -> None:
    on_two_ranks(refusals)
