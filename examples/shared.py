"""What the tutorials share: a command line, training that resumes where it was stopped, a learning curve as a PNG."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import tqdm

OUT = Path(__file__).parent / "out"
HELP = {
    "pretraining": "training steps of the base",
    "steps": "training steps",
    "finetuning": "steps of full fine-tuning",
    "pictures": "pictures to adapt to",
    "requests": "requests in the batch",
    "seed": "random seed",
}


def options(description: str | None, name: str, **numbers: int) -> argparse.Namespace:
    """The command line of a tutorial: `--seed`, `--out`, and an option for each number; in a notebook, the defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, number in {**numbers, "seed": 0}.items():
        parser.add_argument(f"--{option}", type=int, default=number, help=f"{HELP[option]} (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT / name, help="output folder (default: %(default)s)")
    found = parser.parse_args([] if "ipykernel" in sys.modules else None)
    found.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(found.seed)
    return found


def train(
    parameters: Iterable[nn.Parameter] | list[dict[str, Any]],
    loss_of: Callable[[], Tensor],
    steps: int,
    lr: float,
    title: str,
    out: Path,
    *,
    every: int = 50,
) -> list[float]:
    """Train parameters, or groups of them, with AdamW and a learning rate that falls to zero; return the losses.

    Every `every` steps and at the end, a checkpoint is written to `out`. A call that finds one with the same title,
    steps, learning rate and seed resumes from it, so a script that was stopped is simply run again. `done` removes the
    checkpoints, so that an edited script trains anew.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    trained: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{re.sub(r'[^a-z]+', '_', title.lower())}-{steps}-{lr:g}-{torch.initial_seed()}.checkpoint"
    losses: list[float] = []
    if (held := take_up(file, optimizer, schedule)) is not None:
        with torch.no_grad():
            for parameter, value in zip(trained, held["parameters"], strict=True):
                parameter.copy_(value)
        losses = held["losses"]
    for step in tqdm(range(len(losses) + 1, steps + 1), desc=title, unit="step", initial=len(losses), total=steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % every == 0 or step == steps:
            keep(file, optimizer, schedule, parameters=[p.detach() for p in trained], losses=losses)
    return losses


def keep(file: Path, optimizer: Any, schedule: Any, **more: Any) -> None:
    """Write a checkpoint of both, of torch's random state and of `more`; if that fails, the old file stays."""
    states = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "random": torch.get_rng_state()}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(states | more, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


def take_up(file: Path, optimizer: Any, schedule: Any) -> dict[str, Any] | None:
    """Restore both and torch's random state from a checkpoint, and return it; None if there is no such file."""
    if not file.exists():
        return None
    held = torch.load(file)
    optimizer.load_state_dict(held["optimizer"])
    schedule.load_state_dict(held["schedule"])
    torch.set_rng_state(held["random"])
    return held


def done(out: Path) -> None:
    """Remove the checkpoints of `train`."""
    for file in out.glob("*.checkpoint"):
        file.unlink()


def draw(curves: Mapping[str, Sequence[float] | Mapping[int, float]], file: Path) -> None:
    """Plot curves over their steps, as a PNG; of a curve that leaves out steps, the steps are its keys."""
    matplotlib.use("Agg")  # writes a file; opens no window
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        points = curve if isinstance(curve, Mapping) else dict(enumerate(curve, 1))
        axes.plot(list(points), list(points.values()), label=name)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)
    print(f"learning curve: {file}")
