"""parallelize_module, then adapters: the same training as in one process, for every form, by columns and by rows."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import glora
from glora import GLoRAConfig
from tests.helpers.calls import RANDOM
from tests.helpers.models import block
from tests.helpers.ranks import on_two_ranks, whole

pytestmark = pytest.mark.integration

CONFIGS = {
    "default": RANDOM,
    "lora": GLoRAConfig.lora(rank=2, alpha=3.0, init="random"),
    "vectors": GLoRAConfig.glora(A="vector", B="vector", init="random"),
    "constants": GLoRAConfig.glora(A="constant", B="constant", D="constant", E="constant", init="random"),
    "matmul": GLoRAConfig.glora(product="matmul", rank=2, C="lora", init="random"),
    "bias alone": GLoRAConfig.glora(A="none", B="none", init="random"),
}
CREATED = GLoRAConfig.glora(rank=2, create_bias=True, init="random")


def parallel(model: nn.Module) -> nn.Module:
    return parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})


def plain(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return block() if bias else nn.Sequential(nn.Linear(6, 8, bias=False), nn.GELU(), nn.Linear(8, 6, bias=False))


def attach(model: nn.Module, config: GLoRAConfig, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return glora.apply(model, ["0", "2"], config)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def train(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.Adam(glora.parameters(model), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def training(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    x = torch.randn(4, 6)
    for name, config in {**CONFIGS, "created bias": CREATED}.items():
        bias, place = config is not CREATED, Path(folder, name)
        # The first rank's draw counts, whatever the others would draw.
        model, alone = attach(parallel(plain(bias)), config, 1 + rank), attach(plain(bias), config)
        close(model(x), alone(x))
        for each in (model, alone):
            each(x).square().mean().backward()
        gradients = [{key: p.grad for key, p in glora.named_parameters(each)} for each in (model, alone)]
        close(whole(gradients[0]), gradients[1])
        train(model, x)
        train(alone, x)
        close(whole(glora.state_dict(model)), glora.state_dict(alone))
        # A file of it, into one process and back.
        glora.save(model, place)
        close(glora.load(plain(bias), place)(x), alone(x))
        close(glora.load(parallel(plain(bias)), place)(x), alone(x))
        with glora.disabled(model):
            close(model(x), plain(bias)(x))
        # Merged, or taken off.
        glora.merge(model)
        assert type(model[0]) is nn.Linear
        close(model(x), alone(x))
        close(whole(model.state_dict()), glora.merge(alone).state_dict())
        other = glora.remove(attach(parallel(plain(bias)), config))
        close(other(x), plain(bias)(x))


def test_training_files_and_merging_equal_those_in_one_process(tmp_path: Path) -> None:
    on_two_ranks(training, str(tmp_path))


def refusals(_: int) -> None:
    warnings.simplefilter("ignore")
    for config in CONFIGS.values():
        with pytest.raises(RuntimeError, match="Call parallelize_module on the plain model, and then glora.apply"):
            parallel(attach(plain(), config))
    with pytest.raises(ValueError, match="rank dropout would differ by rank"):
        attach(parallel(plain()), GLoRAConfig.glora(rank_dropout=0.1))
    with pytest.raises(RuntimeError, match="Inside glora.merged layers have whole"):
        glora.merged(attach(parallel(plain()), RANDOM)).__enter__()
    with pytest.raises(RuntimeError, match="cannot be routed through layers that parallelize_module"):
        glora.route(attach(parallel(plain()), RANDOM), ["default"]).__enter__()
    # Merged first, it is a plain model.
    x, merged = torch.randn(4, 6), glora.merge(attach(plain(), RANDOM))
    expected = merged(x)
    close(parallel(merged)(x), expected)
    # Divided twice already, by fully_shard too.
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    both = parallelize_module(plain(), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(both, mesh=mesh["data"])
    with pytest.raises(ValueError, match="before fully_shard, and after parallelize_module"):
        attach(both, RANDOM)


def test_what_cannot_be_done_says_what_to_do() -> None:
    on_two_ranks(refusals)


def divided_twice(_: int) -> None:
    warnings.simplefilter("ignore")
    x = torch.randn(4, 6)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    for config in CONFIGS.values():
        model = parallelize_module(plain(), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(attach(model, config), mesh=mesh["data"])
        alone = attach(plain(), config)
        train(model, x)
        train(alone, x)
        close(whole(glora.state_dict(model)), glora.state_dict(alone))


def test_fully_shard_on_top() -> None:
    on_two_ranks(divided_twice)
