"""Train a LoRA on the attention of Stable Diffusion's UNet, write it as a file in kohya's format, and load that file.
It takes one or two minutes on two CPU cores, and downloads nothing: the UNet is small and random, pictures are drawn.

    pip install -e ".[examples,files]" diffusers
    python examples/stable_diffusion.py
"""

# %% [markdown]
# ## The task
#
# A UNet from diffusers learns to remove noise from pictures of horizontal stripes (rows), and an adapter of it from
# vertical ones (columns). The adapter is written to a `.safetensors` file with kohya's names (`lora_unet_...`), which
# web UIs read, and loaded into another copy of the UNet.
#
# With the real model, replace `unet()` by `UNet2DConditionModel.from_pretrained(folder, subfolder="unet")`, the
# pictures by latents of its VAE, and the zeros by outputs of its text encoder.

# %%
from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]
from shared import done, draw, options, train
from torch import Tensor

import glora
from glora.text import table

# %% [markdown]
# ## A UNet, and pictures
#
# The UNet has the parts of Stable Diffusion's: convolutions, self-attention, and cross-attention to a text.

# %%
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def unet() -> Any:
    """A small UNet with random weights."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def latents(count: int, stripes: str) -> Tensor:
    """Striped pictures of four channels, like a VAE's latents."""
    phase = 6.3 * torch.rand(count, 4, 1, 1)
    along = torch.arange(8.0).view((1, 1, 8, 1) if stripes == "rows" else (1, 1, 1, 8))
    return torch.sin(1.5 * along + phase).expand(count, 4, 8, 8)


def denoising_loss(model: Any, schedule: Any, stripes: str) -> Tensor:
    """The squared error of the predicted noise, at random timesteps; the text is all zeros."""
    x, times = latents(16, stripes), torch.randint(schedule.config.num_train_timesteps, (16,))
    noise = torch.randn(x.shape)
    predicted = model(schedule.add_noise(x, noise, times), times, torch.zeros(16, 4, 32)).sample
    return (predicted - noise).square().mean()


@torch.no_grad()
def error(model: Any, schedule: Any, stripes: str) -> float:
    """The mean loss over eight batches, with the same noise at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return sum(denoising_loss(model, schedule, stripes).item() for _ in range(8)) / 8


# %% [markdown]
# ## Train, write, read
#
# The projections of attention are linear layers. `targets=` also takes convolutions, by name; the file is then a LoCon.
# `glora.interop.load_lycoris` takes a mapping from prefix to model, so one call reads a file for the UNet and the text
# encoders.


# %%
def main() -> None:
    chosen = options(__doc__, "stable_diffusion", pretraining=150, steps=100)
    schedule = DDPMScheduler()
    base = unet()

    def fit(model: Any, parameters: Any, stripes: str, steps: int, lr: float, title: str) -> list[float]:
        return train(parameters, lambda: denoising_loss(model, schedule, stripes), steps, lr, title, chosen.out)

    curves = {"the base, on rows": fit(base, base.parameters(), "rows", chosen.pretraining, 2e-3, "the base")}
    model = glora.apply(copy.deepcopy(base), ATTENTION, glora.GLoRAConfig.lora(rank=4))
    groups = glora.parameter_groups(model, 1e-2)
    curves["the adapter, on columns"] = fit(model, groups, "columns", chosen.steps, 1e-2, "the adapter")

    file = chosen.out / "columns.safetensors"
    glora.interop.save_lycoris(model, file, prefix="lora_unet")
    other = glora.interop.load_lycoris({"lora_unet": copy.deepcopy(base)}, file)["lora_unet"]

    rows = [
        [name, f"{error(each, schedule, 'rows'):.3f}", f"{error(each, schedule, 'columns'):.3f}"]
        for name, each in (("the base", base), ("with the adapter", model), ("the same, from the file", other))
    ]
    print(table("error of the predicted noise", ["model", "rows", "columns"], rows))
    print(f"{file}: {file.stat().st_size:,} bytes")
    draw(curves, chosen.out / "learning_curve.png")
    done(chosen.out)


if __name__ == "__main__":
    main()
