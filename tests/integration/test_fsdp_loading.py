"""fully_shard: base weights, adapter files and fresh starts into a model that is attached and sharded already."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import glora
from glora import GLoRAConfig
from tests.helpers.calls import RANDOM
from tests.helpers.ranks import on_two_ranks, whole

pytestmark = pytest.mark.integration

CREATED = GLoRAConfig.glora(rank=2, create_bias=True, init="random")


def net() -> nn.Sequential:
    """Layers with adapters, with and without a bias, one that trains whole, one with neither."""
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6, bias=False), nn.LayerNorm(6))


def attached(config: GLoRAConfig = CREATED, *, shard: bool = True, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = glora.apply(net(), config=config, trainable=["3"])
    return sharded(model) if shard else model


def sharded(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(whole(found), whole(expected), rtol=0, atol=0)


def base_weights(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(7)
    base = net().state_dict()
    ways = [{}, {"broadcast_from_rank0": True}, {"broadcast_from_rank0": True, "strict": False}]
    for options in ways:
        given = {} if options and rank else dict(base)
        for meta in (False, True):
            with torch.device("meta" if meta else "cpu"):
                model = attached()
            adapter = glora.state_dict(model)
            before = {} if meta else {key: tensor.clone() for key, tensor in whole(adapter).items()}
            set_model_state_dict(model, dict(given), options=StateDictOptions(full_state_dict=True, **options))
            equal(glora.base_state_dict(model), base)
            if meta:
                assert all(tensor.is_meta for tensor in glora.state_dict(model).values())
            else:
                equal(glora.state_dict(model), before)
    # Whole tensors that a root keeps after a forward pass are not what is written into, or read.
    model, other = attached(), attached(shard=False, seed=1)
    with torch.no_grad():
        model(torch.randn(2, 6))
    glora.load_state_dict(model, glora.state_dict(other))
    with torch.no_grad():
        model(torch.randn(2, 6))
    held = glora.state_dict(model)
    assert {key for key, tensor in held.items() if not hasattr(tensor, "full_tensor")} == {
        k for k in held if "balance" in k
    }
    equal(glora.state_dict(model), glora.state_dict(other))
    # And out: the whole state, which an attached model in one process takes.
    model, alone = attached(), attached(shard=False, seed=1)
    alone.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    equal(glora.state_dict(model), glora.state_dict(alone))
    equal(glora.base_state_dict(model), glora.base_state_dict(alone))
    set_model_state_dict(model, alone.state_dict(), options=StateDictOptions(full_state_dict=True))
    equal(glora.state_dict(model), glora.state_dict(alone))
    # Each rank reads its own part of a safetensors checkpoint.
    import safetensors.torch

    if rank == 0:
        Path(folder, "base").mkdir()
        safetensors.torch.save_file(base, Path(folder, "base", "model.safetensors"))
    dist.barrier()
    reader = HuggingFaceStorageReader(str(Path(folder, "base")))
    load_parts(glora.base_state_dict(model), storage_reader=reader)
    equal(glora.base_state_dict(model), base)


def test_plain_weights_of_the_base_go_in(tmp_path: Path) -> None:
    on_two_ranks(base_weights, str(tmp_path))


def files(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    x, expected = torch.randn(4, 6), attached(shard=False)
    if rank == 0:
        glora.save(expected, folder)
    dist.barrier()
    for meta in (False, True):
        with torch.device("meta" if meta else "cpu"):
            model = attached(GLoRAConfig.glora(rank=2, create_bias=True))
        if meta:
            model.to_empty(device="cpu")
            for tensor in model.parameters():
                tensor.data.fill_(9.0 + rank)  # what `to_empty` may leave
        base = whole(glora.base_state_dict(expected))
        set_model_state_dict(model, dict(base), options=StateDictOptions(full_state_dict=True))
        with torch.no_grad():
            model(x)  # after which the root keeps whole tensors
        assert glora.load(model, folder) is model
        torch.testing.assert_close(model(x), expected(x), rtol=1e-4, atol=1e-5)
        equal(glora.state_dict(model), glora.state_dict(expected))
        assert all(p.requires_grad for p in glora.parameters(model))
        glora.activate(model, {})
        glora.load(model, folder, trainable=False)
        assert glora.adapters(model) == {"default": 1.0}
        assert not any(p.requires_grad for p in glora.parameters(model))
    # Another adapter is refused as a whole, whatever differs.
    others = [
        RANDOM,
        GLoRAConfig.glora(rank=3, create_bias=True),
        GLoRAConfig.glora(rank=2, alpha=1.0, create_bias=True),
    ]
    for config in (*others, GLoRAConfig.glora(rank=2, A="vector", create_bias=True)):
        model = attached(config)
        before = {key: tensor.clone() for key, tensor in whole(glora.state_dict(model)).items()}
        with pytest.raises(glora.AdapterFileError, match="does not hold the adapter 'default' of this model"):
            glora.load(model, folder)
        equal(glora.state_dict(model), before)
    with pytest.raises(glora.AdapterFileError, match="heads"):
        glora.load(sharded(glora.apply(net(), config=CREATED)), folder)
    with pytest.raises(glora.AdapterFileError, match="in the file alone"):
        glora.load(sharded(glora.apply(net(), ["0"], CREATED, trainable=["3"])), folder)
    for name in ("default", "second"):
        with pytest.raises(glora.AdapterFileError, match="attach or load before fully_shard"):
            glora.load(sharded(net()), folder, name)
    # What is whole is attached to, and never written into.
    with pytest.raises(ValueError, match="'default' is attached already"):
        glora.load(attached(shard=False), folder)


def test_a_file_fills_the_adapter_that_is_attached(tmp_path: Path) -> None:
    on_two_ranks(files, str(tmp_path))


def fresh_starts(_: int) -> None:
    warnings.simplefilter("ignore")
    for config in (GLoRAConfig.glora(rank=4), CREATED, GLoRAConfig.glora(A="vector", product="matmul", init="random")):
        model, alone = attached(config), attached(config, shard=False)
        for each in (model, alone):
            for tensor in glora.parameters(each):
                tensor.data.fill_(9.0)
            torch.manual_seed(3)
            glora.reset_parameters(each)
        found, expected = whole(glora.state_dict(model)), glora.state_dict(alone)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_a_fresh_start_is_that_of_one_process() -> None:
    on_two_ranks(fresh_starts)
