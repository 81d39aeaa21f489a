"""Adapter files: `glora.save` and `glora.load` beside PEFT's, LoRA on many layers: `python -m benchmarks.load`.

The first call reads the base for its fingerprint, which is remembered for as long as the base's tensors live. So each
round has models of its own, with new tensors; the calls of a round follow each other, glora's and PEFT's in turn.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import glora
from benchmarks import report
from benchmarks.peers import peft_model
from benchmarks.report import milliseconds
from benchmarks.timing import Timing

PEFT_SAVE, PEFT_LOAD = "PEFT save_pretrained", "PEFT load_adapter"


def one_round(layers: int, width: int, dtype: torch.dtype, folder: Path) -> dict[str, tuple[float, float]]:
    """Name of a call to its seconds, and those of the processor, which a busy machine changes less."""
    config, seconds = glora.GLoRAConfig.lora(), dict[str, tuple[float, float]]()

    def base() -> nn.Module:
        return nn.Sequential(*(nn.Linear(width, width, dtype=dtype) for _ in range(layers)))

    def measure(name: str, call: Callable[[], object]) -> None:
        gc.collect()
        begin, busy = time.perf_counter(), time.process_time()
        call()
        seconds[name] = time.perf_counter() - begin, time.process_time() - busy

    saved = glora.apply(base(), config=config)
    # Each layer has its name in PEFT's config: names alone are suffixes there, and 1 would be 11 too.
    peer: Any = peft_model(base(), "LoraConfig", config.rank, target_modules=[str(layer) for layer in range(layers)])
    fresh = base()
    fresh.load_state_dict(glora.base_state_dict(saved))
    ours, theirs = folder / "glora", folder / "peft"
    measure("first save", lambda: glora.save(saved, ours))
    measure(PEFT_SAVE, lambda: peer.save_pretrained(theirs))
    measure("save again", lambda: glora.save(saved, ours))
    measure("first load", lambda: glora.load(fresh, ours, "first"))
    measure(PEFT_LOAD, lambda: peer.load_adapter(theirs, "first"))
    measure("load again", lambda: glora.load(fresh, ours, "second"))
    measure("swap, replace=True", lambda: glora.load(fresh, ours, "second", replace=True))
    measure("load, check=False", lambda: glora.load(fresh, ours, "third", check=False))
    return seconds


def main() -> None:
    options = report.start(report.options_of("load", __doc__))
    layers, width, rounds = (4, 256, 2) if options.quick else (24, 2048, 5)
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        samples: list[dict[str, tuple[float, float]]] = []
        for _ in range(rounds + 1):
            with tempfile.TemporaryDirectory() as folder:
                samples.append(one_round(layers, width, dtype, Path(folder)))
        times = {name: Timing(tuple(sample[name][0] for sample in samples[1:]), 1) for name in samples[0]}
        size = {"layers": layers, "width": width, "rank": 8, "base": str(dtype).removeprefix("torch.")}
        found = [
            {**size, "call": name, **milliseconds("time", timing)}
            | {"cpu_ms": 1e3 * statistics.median(sample[name][1] for sample in samples[1:])}
            | {"to_PEFT": timing.ratio(times[PEFT_SAVE if "save" in name else PEFT_LOAD])[1]}
            for name, timing in times.items()
        ]
        report.table(f"LoRA of rank 8 on {layers} layers of {width}, {size['base']}", found, leave_out=list(size))
        rows += found
    report.write_csv(options.out / "load.csv", rows, options.about)


if __name__ == "__main__":
    main()
