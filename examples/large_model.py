"""Train an adapter of a model that does not fit on one rank: shard the base, train, save, and merge the files offline.
The run is on a small random Llama on CPUs; `--estimate` prints the estimated memory per rank for Llama 7B and 70B.

    pip install -e ".[examples,files]"
    torchrun --nproc-per-node 2 examples/large_model.py
    python examples/large_model.py --estimate
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
# ## Build, shard, and load the weights
#
# On the meta device a model takes no memory. The adapter is attached there, then the model is sharded, and each rank
# reads its own part of the weights.


# %%
def sharded(config: LlamaConfig, base: Path, attach: Callable[[nn.Module], object], device: str = "cpu") -> Any:
    """The sharded model with its adapter; no rank ever holds the whole of it.

    Args:
        config: the config of the model.
        base: a folder with its weights in safetensors.
        attach: attaches the adapter: `glora.apply`, or `glora.load`.
        device: the device of the ranks.
    """
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    attach(model)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers are in no checkpoint
    load_parts(glora.base_state_dict(model), storage_reader=HuggingFaceStorageReader(str(base)))
    glora.reset_parameters(model)
    return model


# %% [markdown]
# ## Train, and merge offline
#
# The merge goes through the files tensor by tensor, in one process that never holds the whole model.


# %%
def train(model: Any, batches: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Train one step on each batch of token ids."""
    optimizer = torch.optim.AdamW(glora.parameter_groups(model, lr=0.01))
    for tokens in batches:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return optimizer


def merge_offline(base: Path, adapter: Path, out: Path) -> None:
    """The command `glora merge`: from files to a file."""
    command(["merge", str(base / "model.safetensors"), str(adapter), str(out)])


# %% [markdown]
# ## Memory per rank, counted and by formula


# %%
def local_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes that this rank holds of some tensors."""
    parts: list[Any] = [tensor.detach() for tensor in tensors]
    return sum(part.to_local().nbytes if hasattr(part, "to_local") else part.nbytes for part in parts)


def held(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that this rank holds after a backward pass, counted."""
    trained = list(glora.parameters(model))
    states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    return {
        "weights": local_bytes(glora.base_state_dict(model).values()),
        "factors": local_bytes(trained),
        "gradients": local_bytes(p.grad for p in trained if p.grad is not None),
        "optimizer": local_bytes(states),
    }


def estimate(
    config: LlamaConfig, adapter: glora.GLoRAConfig, ranks: int, tokens: int, width: int = 2
) -> dict[str, int]:
    """Bytes per rank, by formula: frozen parameters of `width` bytes each, trained ones in float32, AdamW.

    Gathered: two blocks at a time, as the next one is gathered while one computes, and for the whole step the layers
    outside of blocks (embedding, output layer, last norm). Activations: each block is checkpointed, so its input for
    each token, and the logits with their gradient in float32. The activations inside one block come on top.
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
    """The whole recipe; every rank runs it."""
    warnings.simplefilter("ignore")
    base, adapter = folder / "base", folder / "adapter"
    if rank == 0:
        LlamaForCausalLM(SMALL).save_pretrained(base)
    dist.barrier()
    model = sharded(SMALL, base, glora.apply)
    optimizer = train(model, torch.randint(64, (5, 4, 16)))
    print(f"rank {rank} holds {held(model, optimizer)}")
    glora.save(model, adapter)  # called by all ranks together
    # Resume from the file: the first load attaches the adapter on the meta device, the second fills its shards.
    model = sharded(SMALL, base, lambda model: glora.load(model, adapter))
    glora.load(model, adapter)
    train(model, torch.randint(64, (2, 4, 16)))
    glora.save(model, adapter)
    if rank == 0:
        merge_offline(base, adapter, folder / "merged.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimate", action="store_true", help="only print the memory per rank for 7B and 70B")
    if parser.parse_args().estimate:
        rows: list[list[str]] = []
        for size, config in SIZES.items():
            for name, adapter in CONFIGS.items():
                for ranks in (1, 2, 8):
                    found = estimate(config, adapter, ranks, tokens=4096)
                    gigabytes = [f"{number / 1e9:.2f}" for number in (*found.values(), sum(found.values()))]
                    rows.append([size, name, str(ranks), *gigabytes])
        heading = ["model", "adapter", "ranks", "weights", "factors", "gradients", "optimizer", "gathered"]
        print(table("GB per rank, bfloat16, 4096 tokens", [*heading, "activations", "all"], rows))
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
