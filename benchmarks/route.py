"""A batch for four adapters and the base: `glora.route` beside PEFT's `adapter_names`, and one adapter for all."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import glora
from benchmarks import report
from benchmarks.peers import peft_model
from benchmarks.timing import interleaved

NAMES = ["a", "b", "c", "d"]


def subjects(width: int, batch: int, tokens: int, rank: int) -> dict[str, Callable[[], object]]:
    """Name to a forward of three layers; each sample's adapter goes round."""
    x = torch.randn(batch, tokens, width)
    ours: list[str | None] = [[*NAMES, None][i % 5] for i in range(batch)]
    theirs = [name or "__base__" for name in ours]
    calls: dict[str, Callable[[], object]] = {}
    for label, config, peft_config in (
        ("LoRA", glora.GLoRAConfig.lora(rank=rank), "LoraConfig"),
        ("GLoRA", glora.GLoRAConfig(rank=rank), "GloraConfig"),
    ):
        model: nn.Module = nn.Sequential(*(nn.Linear(width, width) for _ in range(3))).eval()
        for name in NAMES:
            glora.apply(model, config=config, name=name)
        plain = nn.Sequential(*(nn.Linear(width, width) for _ in range(3))).eval()
        peer: Any = peft_model(plain, peft_config, rank, target_modules=["0", "1", "2"]).eval()
        for name in NAMES:
            peer.add_adapter(name, peer.peft_config["default"])

        def routed(model: nn.Module = model) -> None:
            with torch.no_grad(), glora.route(model, ours):
                model(x)

        def one(model: nn.Module = model) -> None:
            with torch.no_grad():
                model(x)

        def named(peer: Any = peer) -> None:
            with torch.no_grad():
                peer(x, adapter_names=theirs)

        calls |= {f"glora {label}, routed": routed, f"glora {label}, one adapter": one, f"PEFT {label}, names": named}
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.route", description=__doc__)
    report.common_options(parser)
    options = parser.parse_args()
    report.start(options.device, options.threads)
    width, batch, tokens, seconds = (256, 10, 8, 4.0) if options.quick else (1024, 20, 64, 40.0)
    times = interleaved(subjects(width, batch, tokens, rank=8), seconds=seconds)
    rows = [
        {"what": name, "median": t.median, "ratio": t.ratio(times[f"PEFT {name.split()[1].rstrip(',')}, names"]).median}
        for name, t in times.items()
    ]
    report.table(
        f"a forward of 3 layers of {width}, batch {batch} x {tokens}, four adapters and the base, rank 8",
        ["", "milliseconds", "to PEFT's"],
        [[row["what"], f"{1e3 * row['median']:.2f}", f"{row['ratio']:.2f}"] for row in rows],
    )
    report.write_json(options.out / "route.json", {"machine": report.facts(options.device), "rows": rows})


if __name__ == "__main__":
    main()
