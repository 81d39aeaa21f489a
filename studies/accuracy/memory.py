"""Peak memory of a training step of each method, in a process of its own: `python -m studies.accuracy.memory`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks import report
from studies.accuracy.methods import METHODS
from studies.accuracy.model import BATCH
from studies.accuracy.text import MAX_TOKENS, pretrained
from benchmarks.memory import peak_of_step


@dataclass(frozen=True)
class Size:
    """A batch of texts of one length."""

    texts: int = BATCH
    tokens: int = MAX_TOKENS


def prepare_step(name: str, size: dict[str, int], device: str) -> Callable[[], object]:  # noqa: ARG001 - the CPU's
    """A training step, optimizer included, on random tokens."""
    shape = Size(**size)
    model = pretrained().classifier(classes=6, seed=0).train()
    groups = METHODS[name].attach(model)
    parameters = [p for group in groups for p in group.parameters]
    optimizer = torch.optim.AdamW([*parameters, *model.head.parameters()], lr=1e-4, fused=True)
    ids = list(torch.randint(1000, 2000, (shape.texts, shape.tokens)))
    labels = torch.zeros(shape.texts, dtype=torch.long)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(ids), labels).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.accuracy.memory", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for name in tqdm(options.methods, unit="method"):
        peak = peak_of_step("studies.accuracy.memory", name, Size(), Size(1, 2), "cpu")
        rows.append({"method": name, **asdict(Size()), "peak_step_MiB": peak["peak_step_MiB"]})
    report.write_csv(report.RESULTS / "accuracy-memory.csv", rows, report.machine("cpu"))


if __name__ == "__main__":
    main()
