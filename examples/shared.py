"""What the tutorials share: their command line, training under a progress bar, and a learning curve as a PNG."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import tqdm

OUT = Path(__file__).parent / "out"


def options(description: str | None, name: str, **numbers: int) -> argparse.Namespace:
    """The command line of a tutorial: `--seed`, `--out`, and an option for each number. A notebook has none of it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, number in {**numbers, "seed": 0}.items():
        parser.add_argument(f"--{option}", type=int, default=number, help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=OUT / name, help="folder for what is written (default: %(default)s)"
    )
    found = parser.parse_args([] if "ipykernel" in sys.modules else None)
    found.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(found.seed)
    return found


def train(
    parameters: Iterable[nn.Parameter], loss_of: Callable[[], Tensor], steps: int, lr: float, title: str
) -> list[float]:
    """AdamW on some parameters, one step for each loss, down to a learning rate of zero; the losses."""
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    losses: list[float] = []
    for _ in tqdm(range(steps), desc=title, unit="step"):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def draw(curves: dict[str, list[float]], file: Path, *, across: str = "step", upwards: str = "loss") -> None:
    """Curves over their steps, as a PNG."""
    matplotlib.use("Agg")  # a file is all that is wanted: no window
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, label=name)
    axes.set(xlabel=across, ylabel=upwards)
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)
    print(f"learning curve: {file}")
