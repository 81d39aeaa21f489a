"""How the cost grows with rank, active adapters, width and number of layers: `python -m benchmarks.scale`.

A training step of one layer (256 tokens, float32, rank 8, one adapter, 1024 x 1024 unless said), and what is done once
to a model of many layers of 16 x 16: plan, attach, save, load, merge. These alone: `--layers 2000 10000`.
"""

from __future__ import annotations

import copy
import gc
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import glora
from benchmarks import report
from benchmarks.memory import resident
from benchmarks.peers import FROZEN, needs
from benchmarks.report import milliseconds
from benchmarks.timing import interleaved

FORMS = {
    "five paths": glora.GLoRAConfig.glora(),
    "A vector, B lora": glora.GLoRAConfig.glora(A="vector"),
    "B lora": glora.GLoRAConfig.lora(),
}
RANKS, ADAPTERS, WIDTHS, LAYERS = (
    [1, 4, 16, 64, 256],
    [1, 2, 4, 8, 16],
    [256, 512, 1024, 2048, 4096, 8192],
    [100, 1000, 10000],
)


def step(form: str, device: str, width: int = 1024, rank: int = 8, adapters: int = 1) -> Callable[[], object]:
    """A training step of one layer; of a frozen layer for the form `FROZEN`."""
    torch.manual_seed(0)
    layer = nn.Linear(width, width, device=device).requires_grad_(False)
    names = [f"adapter{number}" for number in range(adapters)] if form != FROZEN else []
    for name in names:
        glora.apply(layer, config=replace(FORMS[form], rank=rank), name=name)
    if names:
        glora.activate(layer, dict.fromkeys(names, 1.0))
    x = torch.randn(256, width, device=device, requires_grad=True)
    g, factors = torch.randn(256, width, device=device), [p for p in layer.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(layer(x), [x, *factors], g)


def grow(what: str, values: Sequence[int], device: str, seconds: float) -> list[dict[str, Any]]:
    """The step of each form, and of the frozen layer, at each value of one argument of `step`."""
    rows: list[dict[str, Any]] = []
    for value in values:
        calls = {form: step(form, device, **{what: value}) for form in (*FORMS, FROZEN)}
        times = interleaved(calls, seconds=seconds, device=device)
        for form, timing in times.items():
            row = {"grows": what, "value": value, "call": form, **milliseconds("time", timing)}
            rows.append(row | {"to_frozen": timing.ratio(times[FROZEN])[1]})
    return rows


def many_layers(count: int, rounds: int) -> list[dict[str, Any]]:
    """CPU time of each call on a model of this many layers, the shortest of some rounds, and what stays afterwards."""
    best: dict[str, tuple[float, float]] = {}

    def measure(name: str, call: Callable[..., object], *given: object) -> None:
        gc.collect()
        before, begin = resident(), time.process_time()
        kept = call(*given)
        taken, grown = time.process_time() - begin, (resident() - before) / 2**20
        del kept
        best[name] = min(best.get(name, (taken, grown)), (taken, grown))

    for _ in range(rounds):
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(count)))
        other = copy.deepcopy(model)
        with tempfile.TemporaryDirectory() as folder:
            measure("plan", glora.plan, model, "all-linear", FORMS["five paths"])
            measure("attach", glora.apply, model, "all-linear", FORMS["five paths"])
            measure("save", glora.save, model, folder)
            measure("load", glora.load, other, folder)
            measure("merge", glora.merge, model)
    return [
        {"grows": "layers", "value": count, "call": name, "time_ms": 1e3 * seconds, "kept_MiB": kept}
        for name, (seconds, kept) in best.items()
    ]


def plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A panel for each thing that grows: time against it, both logarithmic."""
    needs("matplotlib").use("Agg")
    pyplot = needs("matplotlib.pyplot")
    kinds = list(dict.fromkeys(row["grows"] for row in rows))
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(3.2 * len(kinds), 3.6), squeeze=False, layout="constrained")
    for axis, kind in zip(axes[0], kinds, strict=True):
        own = [row for row in rows if row["grows"] == kind]
        for name in dict.fromkeys(row["call"] for row in own):
            points = [(row["value"], row["time_ms"]) for row in own if row["call"] == name]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        values = sorted({row["value"] for row in own})
        axis.set(xscale="log", yscale="log", title=kind)
        axis.set_xticks(values, map(str, values), fontsize="small")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", frameon=False)
    axes[0][0].set_ylabel("milliseconds")
    report.save_figure(figure, path)


def main() -> None:
    parser = report.options_of("scale", __doc__)
    parser.add_argument("--seconds", type=float, help="of timing for each point (default: 10; quick: 1)")
    parser.add_argument("--layers", type=int, nargs="+", help="only the calls on models of so many layers")
    options = report.start(parser)
    if options.layers:
        torch.set_num_threads(1)
        many_layers(2, 1)  # first calls import
        report.table("calls on models of many layers", [r for n in options.layers for r in many_layers(n, 1)])
        return
    seconds, few = options.seconds or (1.0 if options.quick else 10.0), 2 if options.quick else None
    rows = [
        row
        for what, values in (("rank", RANKS), ("adapters", ADAPTERS), ("width", WIDTHS))
        for row in grow(what, values[:few], options.device, seconds)
    ]
    rows += [row for count in LAYERS[: few and 1] for row in many_layers(count, 1 if count > 1000 else 3)]
    report.table("time as one thing grows", rows)
    report.write_csv(options.out / "scale.csv", rows, options.about)
    plot(options.out / "scale.png", rows)


if __name__ == "__main__":
    main()
