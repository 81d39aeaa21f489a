"""One linear layer, glora beside its peers: `python -m benchmarks.layer` (`--quick`, `--goals`, `--help`).

Time of a training step (forward, and gradients of the input and of what trains) and of inference; counted matrix
products in units of `2 N out in`; what autograd saves as a share of W0; peak memory; time to attach and to merge.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import glora
from benchmarks import report
from benchmarks.counting import count_products, count_saved
from benchmarks.memory import Peak, peak_of_step
from benchmarks.peers import (
    FROZEN,
    GLORA_A,
    GLORA_B,
    GLORA_DEFAULT,
    GLORA_MERGED,
    GLORA_VECTOR,
    PEERS,
    PEFT_GLORA,
    PEFT_LORA,
    TRAINED,
    make,
    peft_model,
)
from benchmarks.report import Goal, Panel, mebibytes, seconds
from benchmarks.timing import Timing, interleaved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Few enough that a process for each and each width is bearable.
IN_MEMORY = (GLORA_A, GLORA_DEFAULT, GLORA_VECTOR, GLORA_B, FROZEN, TRAINED, PEFT_GLORA, PEFT_LORA, "authors")
QUICK = (GLORA_A, GLORA_DEFAULT, GLORA_VECTOR, GLORA_B, GLORA_MERGED, FROZEN, TRAINED, PEFT_GLORA, PEFT_LORA, "authors")
IN_MEMORY_QUICK = (GLORA_A, TRAINED, PEFT_GLORA, PEFT_LORA)


@dataclass(frozen=True)
class Case:
    """A layer's size (out = in = width), the tokens that go through it, the dtype and the rank."""

    width: int
    tokens: int
    dtype: str
    rank: int

    def __str__(self) -> str:
        return f"out=in={self.width}, {self.tokens} tokens, {self.dtype}, rank {self.rank}"

    @property
    def unit(self) -> int:
        """Operations of one product of the tokens with the layer's weight."""
        return 2 * self.tokens * self.width * self.width


@dataclass(frozen=True)
class Costs:
    """Counted: products of a training step and of inference in units, saved bytes as a share of W0's."""

    training_units: float
    inference_units: float
    saved: float


class Subject:
    """One peer at one case: its layer, and its training step and inference as callables."""

    def __init__(self, name: str, case: Case, device: str) -> None:
        self.case = case
        dtype = DTYPES[case.dtype]
        self.layer = make(name, case.width, case.width, case.rank, dtype, device)
        self.trained = [parameter for parameter in self.layer.parameters() if parameter.requires_grad]
        self.x = torch.randn(case.tokens, case.width, dtype=dtype, device=device, requires_grad=True)
        self.gradient = torch.randn(case.tokens, case.width, dtype=dtype, device=device)

    def forward(self) -> Tensor:
        return self.layer(self.x)

    def training_step(self) -> tuple[Tensor, ...]:
        # Not `backward`: gradients that pile up in `.grad` from step to step would be added, a cost of no peer's own.
        return torch.autograd.grad(self.forward(), [self.x, *self.trained], self.gradient)

    def inference(self) -> Tensor:
        with torch.no_grad():
            return self.forward()

    def costs(self) -> Costs:
        with count_products() as training:
            self.training_step()
        with count_products() as inference:
            self.inference()
        with count_saved([self.x, *self.layer.parameters()]) as saved:
            self.forward()
        weight_bytes = self.case.width**2 * DTYPES[self.case.dtype].itemsize
        unit = self.case.unit
        return Costs(training.flops / unit, inference.flops / unit, saved.bytes / weight_bytes)


def prepare_step(name: str, case: dict[str, Any], device: str) -> Callable[[], object]:
    """For `benchmarks.memory`: a peer's training step."""
    return Subject(name, Case(**case), device).training_step


def peak(name: str, case: Case, device: str) -> Peak:
    """Peak memory of a peer's training step."""
    tiny = Case(width=max(16, 2 * case.rank), tokens=1, dtype=case.dtype, rank=case.rank)
    jobs = [{"name": name, "case": asdict(each), "device": device} for each in (case, tiny)]
    return peak_of_step("benchmarks.layer:prepare_step", *jobs, device=device, threads=torch.get_num_threads())


def measure(case: Case, names: Sequence[str], device: str, budget: float) -> list[dict[str, Any]]:
    """Counts and times of the peers at one case; `budget` is in seconds, for the times."""
    subjects = {name: Subject(name, case, device) for name in names}
    costs = {name: subject.costs() for name, subject in subjects.items()}
    training = interleaved({n: s.training_step for n, s in subjects.items()}, seconds=budget / 2, device=device)
    inference = interleaved({n: s.inference for n, s in subjects.items()}, seconds=budget / 2, device=device)
    return [
        {
            "peer": name,
            **asdict(case),
            **asdict(costs[name]),
            "parameters": sum(parameter.numel() for parameter in subject.trained),
            "training": _numbers(training[name]),
            "inference": _numbers(inference[name]),
        }
        for name, subject in subjects.items()
    ]


def _numbers(timing: Timing) -> dict[str, Any]:
    low, high = timing.quartiles
    return {"median": timing.median, "low": low, "high": high, "rounds": len(timing.samples), "calls": timing.number}


def print_case(case: Case, rows: Sequence[dict[str, Any]]) -> None:
    base = next((row for row in rows if row["peer"] == FROZEN), rows[0])
    lines = [
        [
            row["peer"],
            f"{row['parameters']:,}",
            seconds(row["training"]["median"]),
            f"{row['training']['median'] / base['training']['median']:.2f}",
            seconds(row["inference"]["median"]),
            f"{row['inference']['median'] / base['inference']['median']:.2f}",
            f"{row['training_units']:.2f}",
            f"{row['inference_units']:.2f}",
            f"{row['saved']:.2f}",
        ]
        for row in rows
    ]
    report.table(
        f"{case}; times beside those of {base['peer']}",
        ["layer", "trains", "step", "x", "inference", "x", "step units", "inf. units", "saved / W0"],
        lines,
    )


def attach_and_merge(layers: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Time to adapt and to merge a model of many small layers, where what is done for each layer tells."""

    def ours(model: nn.Module) -> nn.Module:
        return glora.apply(model, config=glora.GLoRAConfig())

    def peft(config: str) -> Callable[[nn.Module], Any]:
        names = [str(number) for number in range(layers)]
        return lambda model: peft_model(model, config, 8, target_modules=names)

    ways: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any], object]]] = {
        GLORA_DEFAULT: (ours, glora.merge),
        PEFT_GLORA: (peft("GloraConfig"), lambda model: model.merge_and_unload()),
        PEFT_LORA: (peft("LoraConfig"), lambda model: model.merge_and_unload()),
    }
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
    for _ in range(rounds + 1):
        for name, (attach, merge) in ways.items():
            model = nn.Sequential(*(nn.Linear(64, 64, device=device) for _ in range(layers)))
            begin = _now(device)
            adapted = attach(model)
            attached = _now(device)
            merge(adapted)
            taken[name][0].append(attached - begin)
            taken[name][1].append(_now(device) - attached)
    # The first round warms up.
    return [
        {
            "peer": n,
            "layers": layers,
            "attach": _numbers(Timing(tuple(a[1:]), 1)),
            "merge": _numbers(Timing(tuple(m[1:]), 1)),
        }
        for n, (a, m) in taken.items()
    ]


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def goals(device: str, budget: float) -> list[Goal]:
    """The times that glora is to keep to, as ratios of one run."""

    def timed(names: Sequence[str], case: Case, what: str) -> dict[str, Timing]:
        subjects = {name: Subject(name, case, device) for name in names}
        return interleaved({n: getattr(s, what) for n, s in subjects.items()}, seconds=budget / 2, device=device)

    case = Case(width=2048, tokens=1024, dtype="fp32", rank=8)
    one_token = Case(width=2048, tokens=1, dtype="fp32", rank=8)
    step = timed([GLORA_A, GLORA_VECTOR, GLORA_B, TRAINED, PEFT_GLORA, PEFT_LORA], case, "training_step")
    inference = timed([GLORA_A, GLORA_MERGED, FROZEN, PEFT_GLORA], one_token, "inference")

    def goal(what: str, timings: dict[str, Timing], mine: str, theirs: str, bound: float, equal: bool = False) -> Goal:
        ratio = timings[mine].ratio(timings[theirs])
        return Goal(f"{what}: {mine} / {theirs}", ratio.median, bound, (ratio.low, ratio.high), equal)

    return [
        goal("step", step, GLORA_A, PEFT_GLORA, 0.60),
        goal("step", step, GLORA_A, TRAINED, 1.20),
        goal("step", step, GLORA_VECTOR, PEFT_GLORA, 0.45),
        goal("step", step, GLORA_B, PEFT_LORA, 1.05),
        goal("one token", inference, GLORA_A, PEFT_GLORA, 0.40),
        # Merged is the same module as nn.Linear: what differs from 1.00 is the noise of this run.
        goal("one token", inference, GLORA_MERGED, FROZEN, 1.00, equal=True),
    ]


def grid(quick: bool) -> list[Case]:
    """The cases, from the cheapest to the dearest: a budget that runs out leaves out the last."""
    widths, tokens = ((256, 1024), (1, 256)) if quick else ((256, 1024, 4096), (1, 16, 256, 2048))
    dtypes, ranks = (("fp32",), (8,)) if quick else (tuple(DTYPES), (8, 64))
    cases = [Case(w, n, d, r) for w in widths for n in tokens for d in dtypes for r in ranks]
    return sorted(cases, key=lambda case: case.unit)


def plot_results(rows: Sequence[dict[str, Any]], peaks: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    shown = [row for row in rows if row["dtype"] == "fp32" and row["rank"] == 8]
    for what in ("training", "inference"):
        panels: list[Panel] = []
        for width in sorted({row["width"] for row in shown}):
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in shown:
                if row["width"] == width:
                    lines.setdefault(row["peer"], []).append((row["tokens"], 1e3 * row[what]["median"]))
            panels.append(Panel(f"{what}, out=in={width}, fp32, r=8", lines))
        if panels:
            report.plot(options.out / f"layer-{what}.png", panels, x="tokens", y="milliseconds (median)")
    memory: dict[str, list[tuple[float, float]]] = {}
    for row in peaks:
        memory.setdefault(row["peer"], []).append((row["width"], max(row["step"], 1) / 2**20))
    if memory:
        title = f"peak memory of a training step, {peaks[0]['tokens']} tokens, {peaks[0]['dtype']}"
        report.plot(options.out / "layer-memory.png", [Panel(title, memory)], x="out = in", y="MiB")


def run(options: argparse.Namespace) -> None:
    """The whole grid, as far as the budget reaches, then memory, then attaching and merging."""
    begin = time.monotonic()
    cases = options.cases or grid(options.quick)
    names = options.peers or list(QUICK if options.quick else PEERS)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for case in cases:
        if time.monotonic() - begin > 60 * options.budget:
            left_out.append(str(case))
            continue
        rows += (found := measure(case, names, options.device, options.seconds))
        print_case(case, found)
    many = attach_and_merge(options.layers, 2 if options.quick else 5, options.device)
    columns = [[r["peer"], seconds(r["attach"]["median"]), seconds(r["merge"]["median"])] for r in many]
    report.table(f"{options.layers:,} layers of 64 x 64", ["adapters", "attach", "merge"], columns)
    peaks: list[dict[str, Any]] = []
    for width in sorted({case.width for case in cases}, reverse=options.quick)[: 1 if options.quick else None]:
        case = Case(width, max(case.tokens for case in cases), "fp32", 8)
        for name in [n for n in (IN_MEMORY_QUICK if options.quick else IN_MEMORY) if n in names]:
            if time.monotonic() - begin > 60 * options.budget:
                left_out.append(f"memory of {name}, {case}")
                continue
            peaks.append({"peer": name, **asdict(case), **asdict(peak(name, case, options.device))})
    lines = [[r["peer"], str(r["width"]), str(r["tokens"]), mebibytes(r["step"]), mebibytes(r["whole"])] for r in peaks]
    report.table("peak memory, fp32, rank 8", ["layer", "out = in", "tokens", "step", "with weights"], lines)
    if left_out:
        print(f"The budget of {options.budget:g} minutes left out: {'; '.join(left_out)}.")
    report.write_json(
        options.out / "layer.json",
        {
            "machine": report.facts(options.device),
            "units": {"times": "seconds of one call", "memory": "bytes", "products": "2 * tokens * out * in"},
            "cases": rows,
            "memory": peaks,
            "attach_and_merge": many,
            "left_out": left_out,
        },
    )
    plot_results(rows, peaks, options)


def _case(text: str) -> Case:
    width, tokens, dtype, rank = text.split(",")
    if dtype not in DTYPES:
        raise argparse.ArgumentTypeError(f"the dtype must be one of {', '.join(DTYPES)}; found {dtype!r}")
    return Case(int(width), int(tokens), dtype, int(rank))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=(__doc__ or "").partition(":")[0])
    report.common_options(parser)
    parser.add_argument("--goals", action="store_true", help="only the ratios that glora is to keep to")
    parser.add_argument("--budget", type=float, default=120.0, help="minutes, after which no case is begun")
    parser.add_argument("--seconds", type=float, help="of timing for each case (default: 30; quick: 4; goals: 60)")
    parser.add_argument(
        "--layers", type=int, help="of the model that is attached to and merged (default: 1000; quick: 200)"
    )
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), metavar="PEER", help=f"of: {', '.join(PEERS)}")
    parser.add_argument(
        "--cases", nargs="+", type=_case, metavar="W,N,DTYPE,R", help="instead of the grid: 1024,16,fp32,8"
    )
    options = parser.parse_args()
    options.layers = options.layers or (200 if options.quick else 1000)
    options.seconds = options.seconds or (60.0 if options.goals else 4.0 if options.quick else 30.0)
    report.start(options.device, options.threads)
    if not options.goals:
        run(options)
        return
    found = goals(options.device, options.seconds)
    report.print_goals("out=in=2048, fp32, rank 8; steps of 1024 tokens", found)
    results = [asdict(goal) | {"met": goal.met} for goal in found]
    report.write_json(options.out / "layer-goals.json", {"machine": report.facts(options.device), "goals": results})


if __name__ == "__main__":
    main()
