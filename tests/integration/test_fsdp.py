"""fully_shard: training, files written once by all ranks together; what is refused says what to do."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import glora
from glora import GLoRAConfig
from tests.helpers.calls import RANDOM, step
from tests.helpers.models import block
from tests.helpers.ranks import on_two_ranks

pytestmark = pytest.mark.integration

CONFIGS = {
    "default": RANDOM,
    "vectors": GLoRAConfig.glora(A="vector", B="vector", init="random"),
    "matmul": GLoRAConfig.glora(product="matmul", rank=2, init="random"),
    "lora": GLoRAConfig.lora(rank=2, init="random"),
}


def fresh(config: GLoRAConfig | None = RANDOM) -> nn.Module:
    torch.manual_seed(0)
    return block() if config is None else glora.apply(block(), config=config)


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def trained_and_saved(_: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(4, 6)  # the same on both ranks
    for name, config in CONFIGS.items():
        model, alone = sharded(fresh(config), mesh), fresh(config)
        step(model, x)
        step(alone, x)
        place = Path(folder, name)
        glora.save(model, place)
        assert place.exists()  # on every rank, as soon as it has left
        same(glora.state_dict(glora.load(fresh(None), place)), glora.state_dict(alone))
        # Whole tensors into a sharded model, and sharded ones into a whole model.
        other = sharded(fresh(config), mesh)
        glora.load_state_dict(other, glora.state_dict(alone))
        torch.testing.assert_close(other(x), alone(x), rtol=1e-4, atol=1e-6)
        whole = fresh(config)
        glora.load_state_dict(whole, glora.state_dict(model))
        same(glora.state_dict(whole), glora.state_dict(alone))
        dist.barrier()


def test_training_saving_and_loading_equal_those_in_one_process(tmp_path: Path) -> None:
    on_two_ranks(trained_and_saved, str(tmp_path))


def loaded_on_meta(_: int, folder: str) -> None:
    """The recipe for a model that is larger than a rank: meta device, load, shard, memory, tensors."""
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (2,))
    x, alone = torch.randn(4, 6), fresh()
    if dist.get_rank() == 0:
        glora.save(alone, folder)
    dist.barrier()
    with torch.device("meta"):
        model = block()
    glora.apply(model, config=RANDOM)
    sharded(model, mesh)
    model.to_empty(device="cpu")
    base = fresh(None).state_dict()
    from torch.distributed.tensor import distribute_tensor

    for key, tensor in glora.base_state_dict(model).items():
        tensor.copy_(distribute_tensor(base[key], tensor.device_mesh, tensor.placements))
    glora.load_state_dict(model, glora.state_dict(glora.load(fresh(None), folder)))
    torch.testing.assert_close(model(x), alone(x), rtol=1e-4, atol=1e-6)


def test_a_model_on_the_meta_device_is_sharded_and_filled(tmp_path: Path) -> None:
    on_two_ranks(loaded_on_meta, str(tmp_path))


def refusals(_: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    from torch.distributed.fsdp import FullyShardedDataParallel

    mesh = init_device_mesh("cpu", (2,))
    # A file that cannot be written: every rank raises, none waits.
    blocked = Path(folder, "a file")
    blocked.touch()
    with pytest.raises(OSError, match="a file"):
        glora.save(sharded(fresh(), mesh), blocked / "below")
    bare = sharded(fresh(None), mesh)
    with pytest.raises(ValueError, match="attach or load before fully_shard"):
        glora.apply(bare, ["0"], config=glora.GLoRAConfig.glora())
    supernet = sharded(glora.search.supernet(fresh(None), "all-linear", glora.search.Space()), mesh)
    with pytest.raises(RuntimeError, match="Extract first"):
        glora.search.extract(supernet, {"0": GLoRAConfig.lora(rank=2)})
    flat, alone = FullyShardedDataParallel(fresh(), use_orig_params=True, device_id=torch.device("cpu")), fresh()
    for call in (lambda: glora.save(flat, folder), lambda: glora.state_dict(flat)):
        with pytest.raises(RuntimeError, match="summon_full_params"):
            call()
    with FullyShardedDataParallel.summon_full_params(flat):
        same(glora.state_dict(flat), glora.state_dict(alone))
        glora.save(flat, Path(folder, f"of rank {dist.get_rank()}"))


def test_what_cannot_be_done_says_what_to_do(tmp_path: Path) -> None:
    on_two_ranks(refusals, str(tmp_path))
