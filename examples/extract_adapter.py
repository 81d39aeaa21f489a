"""Turn a fine-tuned checkpoint into an adapter, and see how close adapters of several sizes come to it.
It takes half a minute on two CPU cores, and downloads nothing.

    pip install -e ".[examples,files]"
    python examples/extract_adapter.py
"""

# %% [markdown]
# ## The task
#
# Someone has fully fine-tuned a model, and the checkpoint is as large as the base. `glora.extract` finds the adapter
# that comes closest to it, and prints how close. It needs no data and no training: the nearest LoRA comes from the
# singular value decomposition (SVD) of the difference, layer by layer.
#
# Here a small network learns one function, and is then fine-tuned on another.

# %%
from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from shared import done, draw, options, train
from torch import Tensor, nn

import glora
from glora.__main__ import main as command
from glora.text import table

# %% [markdown]
# ## A base, and a fine-tuned checkpoint


# %%
def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))


def task(x: Tensor, shift: float) -> Tensor:
    """Four smooth functions of eight inputs; another `shift` gives another task."""
    return torch.stack([torch.sin(x[:, i] * 2 + shift) * x[:, i + 4] for i in range(4)], 1)


def fit(model: nn.Module, shift: float, steps: int, lr: float, title: str, out: Path) -> list[float]:
    """Train the whole model on a task."""

    def loss() -> Tensor:
        x = torch.randn(256, 8)
        return (model(x) - task(x, shift)).square().mean()

    return train(model.parameters(), loss, steps, lr, title, out)


@torch.no_grad()
def error(model: nn.Module, x: Tensor) -> float:
    """Mean squared error on the second task."""
    return (model(x) - task(x, 0.5)).square().mean().item()


# %% [markdown]
# ## Extract
#
# The checkpoint is read tensor by tensor: there is no second model in memory. `extract` prints the error of each layer,
# as a share of the change by fine-tuning, and attaches the adapter, which can be trained further, saved, or merged.


# %%
def extracted(base: nn.Module, tuned: Path, config: glora.GLoRAConfig) -> nn.Module:
    """A copy of the base with the nearest adapter."""
    return glora.extract(copy.deepcopy(base), tuned, config=config)


# %% [markdown]
# ## How small can it be?
#
# All five paths together also adapt the biases; LoRA does not. The last lines run the same on the command line, which
# needs only the two checkpoints.


# %%
def main() -> None:
    chosen = options(__doc__, "extract", steps=600, finetuning=300)
    base = network()
    curves = {"base": fit(base, 0.0, chosen.steps, 5e-3, "the base", chosen.out)}
    save_file(base.state_dict(), chosen.out / "base.safetensors")
    tuned = copy.deepcopy(base)
    curves["fine-tuned"] = fit(tuned, 0.5, chosen.finetuning, 2e-3, "fine-tuning", chosen.out)
    save_file(tuned.state_dict(), chosen.out / "tuned.safetensors")

    x = torch.randn(4096, 8)
    whole = sum(p.numel() for p in base.parameters())
    rows: list[list[str | int]] = [["the base", 0, f"{error(base, x):.4f}"]]
    configs = {f"LoRA, rank {rank}": glora.GLoRAConfig.lora(rank=rank) for rank in (1, 2, 4, 8)}
    configs["five paths, rank 4"] = glora.GLoRAConfig.glora(rank=4)
    for name, config in configs.items():
        model = extracted(base, chosen.out / "tuned.safetensors", config)
        count = sum(tensor.numel() for tensor in glora.state_dict(model).values())
        rows.append([name, count, f"{error(model, x):.4f}"])
        glora.save(model, chosen.out / "adapter")
    rows.append(["the fine-tuned model", whole, f"{error(tuned, x):.4f}"])
    print(table("the second task", ["model", "numbers saved", "error"], rows))
    draw(curves, chosen.out / "learning_curve.png")

    files = [str(chosen.out / name) for name in ("base.safetensors", "tuned.safetensors", "by_command")]
    print("glora extract base.safetensors tuned.safetensors by_command --rank 4")
    command(["extract", *files, "--rank", "4"])
    done(chosen.out)


if __name__ == "__main__":
    main()
