"""A language model that is larger than a rank: sharded on the meta device, trained, saved, merged offline.

    torchrun --nproc-per-node 2 examples/large_model.py      # a small random Llama, on CPUs
    python examples/large_model.py --reckon                  # memory per rank for Llama's 7B and 70B

Needs `pip install -e '.[examples,files]'`.
"""

# %%
from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import glora
from glora.__main__ import main as command
from glora.text import table

SMALL = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_length=16
)
SIZES = {
    "7B": LlamaConfig(),
    "70B": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}
CONFIGS = {"LoRA": glora.GLoRAConfig.lora(), "five paths": glora.GLoRAConfig.glora(create_bias=True)}


# %% [markdown]
# ## Built on the meta device, sharded, filled
#
# On the meta device a model has no memory. The adapter is attached there, then the model is sharded, and each rank
# reads its own part of the weights.


# %%
def sharded(config: LlamaConfig, base: Path, attach: Callable[[nn.Module], object], device: str = "cpu") -> Any:
    """The model with an adapter; no rank ever holds more of it than its part, and one block.

    Args:
        config: the model's.
        base: a folder with its weights in safetensors.
        attach: puts the adapter on: `glora.apply`, or `glora.load`.
        device: that of the ranks.
    """
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    attach(model)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # buffers that no checkpoint holds
    load_parts(glora.base_state_dict(model), storage_reader=HuggingFaceStorageReader(str(base)))
    glora.reset_parameters(model)
    return model


# %% [markdown]
# ## Trained, and merged offline
#
# The merge goes tensor by tensor, in one process that never holds the model.


# %%
def train(model: Any, batches: Iterable[Tensor]) -> torch.optim.Optimizer:
    """A step for each batch of token ids."""
    optimizer = torch.optim.AdamW(glora.parameter_groups(model, lr=0.01))
    for tokens in batches:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return optimizer


def merge_offline(base: Path, adapter: Path, out: Path) -> None:
    """`glora merge`, tensor by tensor, on one process without the model."""
    command(["merge", str(base / "model.safetensors"), str(adapter), str(out)])


# %% [markdown]
# ## How much a rank holds, counted and by formula


# %%
def local_bytes(tensors: Iterable[Tensor]) -> int:
    """What this rank holds of some tensors."""
    parts: list[Any] = [tensor.detach() for tensor in tensors]
    return sum(part.to_local().nbytes if hasattr(part, "to_local") else part.nbytes for part in parts)


def held(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that this rank holds, counted, after a backward pass."""
    trained = list(glora.parameters(model))
    states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    return {
        "weights": local_bytes(glora.base_state_dict(model).values()),
        "factors": local_bytes(trained),
        "gradients": local_bytes(p.grad for p in trained if p.grad is not None),
        "optimizer": local_bytes(states),
    }


def reckon(config: LlamaConfig, adapter: glora.GLoRAConfig, ranks: int, tokens: int, width: int = 2) -> dict[str, int]:
    """Bytes per rank, by formula: P frozen numbers of `width` bytes, F trained ones in float32, AdamW.

    Blocks are gathered one at a time, and the next one while the first computes; the root's own (embedding, output
    layer, last norm) for the whole step. Activations: with each block checkpointed, its input for each token, and the
    logits with their gradient in float32; what one block makes of its input comes on top.
    """
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    frozen, block = (sum(p.numel() for p in part.parameters()) for part in (model, model.model.layers[0]))
    layers = config.num_hidden_layers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        factors = glora.plan(model, config=adapter).parameters
    root = frozen - layers * block
    return {
        "weights": width * frozen // ranks,
        "factors": 4 * factors // ranks,
        "gradients": 4 * factors // ranks,
        "optimizer": 8 * factors // ranks,
        "gathered": width * (root + 2 * block) + 4 * 2 * factors // layers,
        "activations": tokens * (width * layers * config.hidden_size + 2 * 4 * config.vocab_size),
    }


# %% [markdown]
# ## All together


# %%
def run(rank: int, folder: Path) -> None:
    """The whole recipe, in every process of a group."""
    warnings.simplefilter("ignore")
    base, adapter = folder / "base", folder / "adapter"
    if rank == 0:
        LlamaForCausalLM(SMALL).save_pretrained(base)
    dist.barrier()
    model = sharded(SMALL, base, glora.apply)
    optimizer = train(model, torch.randint(64, (5, 4, 16)))
    print(f"rank {rank} holds {held(model, optimizer)}")
    glora.save(model, adapter)  # all ranks together
    # Training goes on from the file: it is attached on the meta device, and fills what is sharded.
    model = sharded(SMALL, base, lambda model: glora.load(model, adapter))
    glora.load(model, adapter)
    train(model, torch.randint(64, (2, 4, 16)))
    glora.save(model, adapter)
    if rank == 0:
        merge_offline(base, adapter, folder / "merged.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reckon", action="store_true", help="print memory per rank for 7B and 70B")
    if parser.parse_args().reckon:
        rows: list[list[str]] = []
        for size, config in SIZES.items():
            for name, adapter in CONFIGS.items():
                for ranks in (1, 2, 8):
                    found = reckon(config, adapter, ranks, tokens=4096)
                    gigabytes = [f"{number / 1e9:.2f}" for number in (*found.values(), sum(found.values()))]
                    rows.append([size, name, str(ranks), *gigabytes])
        heading = ["model", "adapter", "ranks", "weights", "factors", "gradients", "optimizer", "gathered"]
        print(table("GB a rank, bfloat16, 4096 tokens", [*heading, "activations", "all"], rows))
        return
    dist.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as own:
        shared: list[str | None] = [own]
        dist.broadcast_object_list(shared, src=0)
        run(dist.get_rank(), Path(str(shared[0])))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
