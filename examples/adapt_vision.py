"""Adapt a small ViT to pictures from another camera in four ways, compare them, and save and merge an adapter.
It takes about a minute on two CPU cores, and downloads nothing: the script draws its pictures.

    pip install -e ".[examples,files]"
    python examples/adapt_vision.py
"""

# %% [markdown]
# ## The task
#
# A Vision Transformer from transformers is trained on clean pictures of four shapes. Then the camera changes: its
# pictures are noisy negatives. The model is adapted in four ways, with 400 of these pictures.
#
# With a model of your own, start at [the adapter](#the-adapter): replace `vit()` by `from_pretrained`, or by a model
# from timm or torchvision, and the pictures by your data loader.

# %%
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from shared import done, draw, options, train
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import glora
from glora.text import table

# %% [markdown]
# ## Pictures
#
# A disc, a ring, a square or a cross, at a random place and of a random size, in 24 x 24 grey pixels.


# %%
def pictures(count: int, *, negative: bool) -> tuple[Tensor, Tensor]:
    """Pictures (count, 1, 24, 24), and the label of the shape in each."""
    labels = torch.randint(4, (count,))
    size = 4 + 5 * torch.rand(count, 1, 1)
    place = 9 + 6 * torch.rand(2, count, 1, 1)
    rows, columns = torch.arange(24.0).view(1, -1, 1) - place[0], torch.arange(24.0).view(1, 1, -1) - place[1]
    distance = (rows**2 + columns**2).sqrt()
    square = torch.maximum(rows.abs(), columns.abs()) < size * 0.8
    cross = (torch.minimum(rows.abs(), columns.abs()) < 1.5) & (distance < size)
    shapes = torch.stack([distance < size, (distance - size).abs() < 1.2, square, cross], 1).float()
    x = shapes[torch.arange(count), labels].unsqueeze(1)
    return (1 - x if negative else x) + (0.6 if negative else 0.1) * torch.randn_like(x), labels


def vit() -> Any:
    """A small ViT for four classes, with random weights."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=24,
            patch_size=4,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            num_labels=4,
        )
    )


def fit(model: Any, x: Tensor, y: Tensor, steps: int, lr: float, title: str, out: Path) -> list[float]:
    """Train the parameters that require a gradient, on random batches of 64."""

    def loss() -> Tensor:
        rows = torch.randint(len(x), (64,))
        return F.cross_entropy(model(x[rows]).logits, y[rows])

    if glora.adapters(model):
        return train(glora.parameter_groups(model, lr), loss, steps, lr, title, out)
    return train([p for p in model.parameters() if p.requires_grad], loss, steps, lr, title, out)


@torch.no_grad()
def accuracy(model: Any, x: Tensor, y: Tensor) -> float:
    """The share of right answers."""
    return (model(x).logits.argmax(1) == y).float().mean().item()


# %% [markdown]
# ## The adapter
#
# `glora.plan` shows what `glora.apply` would do. `LINEAR` matches the linear layers of attention and feed-forward, as
# `"all-linear"` would. The patch embedding is a convolution, so it is adapted only if it is named, as in `ALL`. The
# classifier is small and is trained in full: `trainable="auto"` finds it.

# %%
LINEAR = {r".*\.(attention\..*|intermediate\.dense|output\.dense|mlp\..*)": glora.GLoRAConfig.lora(rank=4)}
ALL = {r".*patch_embeddings\.projection": glora.GLoRAConfig.lora(rank=4), **LINEAR}


def adapted(base: Any, kind: str) -> Any:
    """A copy of the base, ready to be trained in one of four ways."""
    model = copy.deepcopy(base)
    if kind == "classifier alone":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
    elif kind != "full fine-tuning":
        glora.apply(model, LINEAR if kind == "LoRA" else ALL, trainable="auto")
    return model


# %% [markdown]
# ## Train and compare


# %%
def main() -> None:
    chosen = options(__doc__, "vision", pretraining=300, steps=150, pictures=400)
    base = vit()
    fit(base, *pictures(4096, negative=False), chosen.pretraining, 2e-3, "the base, on clean pictures", chosen.out)
    x, y = pictures(chosen.pictures, negative=True)
    test = pictures(1000, negative=True)
    base.eval()
    print(glora.plan(base, ALL, trainable="auto"))

    rows: list[list[str | int]] = [["the base as it is", 0, f"{accuracy(base, *test):.1%}"]]
    curves: dict[str, list[float]] = {}
    for kind, lr in (
        ("classifier alone", 1e-2),
        ("LoRA", 5e-3),
        ("LoRA, patches too", 5e-3),
        ("full fine-tuning", 5e-4),
    ):
        model = adapted(base, kind)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        curves[kind] = fit(model, x, y, chosen.steps, lr, kind, chosen.out)
        rows.append([kind, trained, f"{accuracy(model, *test):.1%}"])
        if kind == "LoRA, patches too":
            glora.save(model, chosen.out / "adapter")
            before = model(test[0]).logits
            difference = (glora.merge(model)(test[0]).logits - before).abs().max()
            print(f"merging changed a logit by at most {difference:.1e}")
    print(table("noisy negatives", ["method", "trainable", "test accuracy"], rows))
    draw(curves, chosen.out / "learning_curve.png")
    done(chosen.out)


if __name__ == "__main__":
    main()
