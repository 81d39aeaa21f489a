"""Adapt a vision model: a small ViT that knows shapes learns them from noisy negatives.

    pip install -e ".[examples,files]"
    python examples/adapt_vision.py

About a minute on two CPU cores. Nothing is downloaded: the images are drawn by the script.
"""

# %% [markdown]
# ## The task
#
# A Vision Transformer of transformers is trained on clean pictures of four shapes. Then the camera changes: pictures
# come as negatives, with noise. The model is adapted to them from a few of these pictures, in four ways.
#
# With a model of your own, start at [the adapter](#the-adapter): replace `vit()` by `from_pretrained`, or by a model of
# timm or torchvision, and the pictures by your data loader.

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
# A filled circle, a ring, a square and a cross, at a random place and of a random size, in 24 x 24 grey pixels.


# %%
def pictures(count: int, *, negative: bool) -> tuple[Tensor, Tensor]:
    """Pictures (count, 1, 24, 24) and the shape in each one."""
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
    """Train what asks for a gradient, on random batches of 64."""

    def loss() -> Tensor:
        rows = torch.randint(len(x), (64,))
        return F.cross_entropy(model(x[rows]).logits, y[rows])

    if glora.adapters(model):
        return train(glora.parameter_groups(model, lr), loss, steps, lr, title, out)
    return train([p for p in model.parameters() if p.requires_grad], loss, steps, lr, title, out)


@torch.no_grad()
def accuracy(model: Any, x: Tensor, y: Tensor) -> float:
    """The share of shapes that are named right."""
    return (model(x).logits.argmax(1) == y).float().mean().item()


# %% [markdown]
# ## The adapter
#
# `glora.plan` says what `glora.apply` would do. `"all-linear"` reaches the attention and the feed-forward layers; the
# patch embedding is a convolution, and is adapted where it is named. The classifier is small, and trains as a whole:
# `trainable="auto"` finds it.

# %%
LINEAR = {r".*\.(attention\..*|intermediate\.dense|output\.dense|mlp\..*)": glora.GLoRAConfig.lora(rank=4)}
ALL = {r".*patch_embeddings\.projection": glora.GLoRAConfig.lora(rank=4), **LINEAR}


def adapted(base: Any, kind: str) -> Any:
    """A copy of the base that trains in one of four ways."""
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
            print(f"merged: the largest difference of a logit is {difference:.1e}")
    print(table("noisy negatives", ["method", "trainable", "test accuracy"], rows))
    draw(curves, chosen.out / "learning_curve.png")
    done(chosen.out)


if __name__ == "__main__":
    main()
