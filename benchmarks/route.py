"""A batch for several adapters and the base: `glora.route` beside PEFT's `adapter_names`, and one adapter for all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import glora
from benchmarks import report
from benchmarks.peers import peft_model
from benchmarks.timing import interleaved


def subjects(
    width: int,
    batch: int,
    tokens: int,
    adapters: int,
    rank: int,
    device: str,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Callable[[], object]]:
    """Name to a forward of three layers; each sample's adapter goes round."""
    names = [f"adapter{number}" for number in range(adapters)]
    x = torch.randn(batch, tokens, width, dtype=dtype, device=device)
    ours: list[str | None] = [[*names, None][i % (adapters + 1)] for i in range(batch)]
    theirs = [name or "__base__" for name in ours]
    calls: dict[str, Callable[[], object]] = {}
    for label, config, peft_config in (
        ("LoRA", glora.GLoRAConfig.lora(rank=rank), "LoraConfig"),
        ("GLoRA", glora.GLoRAConfig(rank=rank), "GloraConfig"),
    ):
        model: nn.Module = nn.Sequential(
            *(nn.Linear(width, width, dtype=dtype, device=device) for _ in range(3))
        ).eval()
        for name in names:
            glora.apply(model, config=config, name=name)
        plain = nn.Sequential(*(nn.Linear(width, width, dtype=dtype, device=device) for _ in range(3))).eval()
        peer: Any = peft_model(plain, peft_config, rank, target_modules=["0", "1", "2"]).eval()
        for name in names:
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
    options = report.start(report.options_of("route", __doc__))
    width, batch, seconds = (256, 10, 2.0) if options.quick else (1024, 64, 20.0)
    rows: list[dict[str, Any]] = []
    for tokens, adapters in itertools.product([8] if options.quick else [64, 1], [4] if options.quick else [1, 4, 16]):
        size = {"width": width, "batch": batch, "tokens": tokens, "adapters": adapters, "rank": 8}
        times = interleaved(subjects(**size, device=options.device), seconds=seconds, device=options.device)
        found: list[dict[str, Any]] = []
        for name, timing in times.items():
            low, ratio, high = timing.ratio(times[f"PEFT {name.split()[1].rstrip(',')}, names"])
            row = {**size, "call": name, "forward_ms": 1e3 * timing.median}
            found.append(row | {"forward_to_PEFT": ratio, "from": low, "to": high})
        title = f"a forward of 3 layers of {width}, batch {batch} x {tokens}, {adapters} adapters and the base, rank 8"
        report.table(title, found, leave_out=list(size))
        rows += found
    report.write_csv(options.out / "route.csv", rows, options.about)


if __name__ == "__main__":
    main()
