"""One linear layer, glora beside its peers: `python -m benchmarks.layer` (`--quick`, `--goals`, `--help`).

Columns of `layer.csv`: out = in = `width`; `trained` parameters; `step` is forward, and gradients of the input and of
what trains; `low` and `high` are quartiles; `products` are counted operations of matrix products in units of
`2 tokens out in`; `saved_to_W0` is what autograd saves as a share of W0's bytes; `peak_step` leaves out what was in use
before the step, `peak_whole` does not. `layer-attach.csv` has the times to adapt and to merge a model of many layers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import glora
from benchmarks import report
from benchmarks.memory import peak_of_step
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
from benchmarks.report import milliseconds
from benchmarks.timing import Timing, interleaved
from tests.helpers.counting import count_products, count_saved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Few enough that a process for each and each width is bearable.
IN_MEMORY = (GLORA_A, GLORA_DEFAULT, GLORA_VECTOR, GLORA_B, FROZEN, TRAINED, PEFT_GLORA, PEFT_LORA, "authors")
QUICK = (*IN_MEMORY, GLORA_MERGED)
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


TINY = Case(width=16, tokens=1, dtype="fp32", rank=8)


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

    def counted(self) -> dict[str, float]:
        with count_products() as training:
            self.training_step()
        with count_products() as inference:
            self.inference()
        with count_saved([self.x, *self.layer.parameters()]) as saved:
            self.forward()
        return {
            "step_products": training.flops / self.case.unit,
            "inference_products": inference.flops / self.case.unit,
            "saved_to_W0": saved.bytes / (self.case.width**2 * DTYPES[self.case.dtype].itemsize),
        }


def prepare_step(name: str, case: dict[str, Any], device: str) -> Callable[[], object]:
    """For `benchmarks.memory`: a peer's training step."""
    return Subject(name, Case(**case), device).training_step


def timed(subjects: Mapping[str, Subject], what: str, seconds: float, device: str) -> dict[str, Timing]:
    """Times of the subjects' method of this name."""
    return interleaved({n: getattr(s, what) for n, s in subjects.items()}, seconds=seconds, device=device)


def measure(run: str, case: Case, names: Sequence[str], device: str, seconds: float) -> list[dict[str, Any]]:
    """A row for each peer at one case; `seconds` are for the times."""
    subjects = {name: Subject(name, case, device) for name in names}
    counted = {name: subject.counted() for name, subject in subjects.items()}
    training = timed(subjects, "training_step", seconds / 2, device)
    inference = timed(subjects, "inference", seconds / 2, device)
    return [
        {"run": run, **asdict(case), "layer": name, "trained": sum(p.numel() for p in subject.trained)}
        | milliseconds("step", training[name])
        | milliseconds("inference", inference[name])
        | counted[name]
        for name, subject in subjects.items()
    ]


def attach_and_merge(run: str, layers: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Time to adapt and to merge a model of many small layers, where what is done for each layer tells."""

    def ours(model: nn.Module) -> nn.Module:
        return glora.apply(model, config=glora.GLoRAConfig.glora())

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
        {"run": run, "layer": name, "layers": layers}
        | milliseconds("attach", Timing(tuple(attached[1:]), 1))
        | milliseconds("merge", Timing(tuple(merged[1:]), 1))
        for name, (attached, merged) in taken.items()
    ]


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def goals(device: str, seconds: float) -> list[dict[str, Any]]:
    """The times that glora is to keep to, as ratios of one run."""
    case = Case(width=2048, tokens=1024, dtype="fp32", rank=8)
    one_token = Case(width=2048, tokens=1, dtype="fp32", rank=8)
    trained = (GLORA_A, GLORA_VECTOR, GLORA_B, TRAINED, PEFT_GLORA, PEFT_LORA)
    used = (GLORA_A, GLORA_MERGED, FROZEN, PEFT_GLORA)
    step = timed({name: Subject(name, case, device) for name in trained}, "training_step", seconds / 2, device)
    inference = timed({name: Subject(name, one_token, device) for name in used}, "inference", seconds / 2, device)

    def goal(what: str, times: dict[str, Timing], mine: str, theirs: str, bound: float, **how: bool) -> dict[str, Any]:
        return report.goal(f"{what}: {mine} / {theirs}", times[mine].ratio(times[theirs]), bound, **how)

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


_MEMORY = ("layer", "width", "tokens", "peak_step_MiB", "peak_whole_MiB")


def run(options: argparse.Namespace, seconds: float) -> None:
    """The whole grid, as far as the budget reaches, then memory, then attaching and merging."""
    begin, device, quick = time.monotonic(), options.device, options.quick
    cases = options.cases or grid(quick)
    kind = "cases" if options.cases else "quick" if quick else "grid"
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []

    def in_budget(what: str) -> bool:
        if reached := time.monotonic() - begin > 60 * options.budget:
            left_out.append(what)
        return not reached

    for case in cases:
        if in_budget(str(case)):
            rows += (found := measure(kind, case, QUICK if quick else list(PEERS), device, seconds))
            report.table(str(case), found, leave_out=["run", *asdict(case)])
    for width in [cases[-1].width] if quick else sorted({case.width for case in cases}):
        case = Case(width, max(case.tokens for case in cases), "fp32", 8)
        for name in IN_MEMORY_QUICK if quick else IN_MEMORY:
            if in_budget(f"memory of {name}, {case}"):
                key = {"run": kind, **asdict(case), "layer": name}
                row = next((row for row in rows if key.items() <= row.items()), None)
                if row is None:
                    rows.append(row := key)
                row |= peak_of_step("benchmarks.layer", name, case, TINY, device)
    if peaks := [{c: row[c] for c in _MEMORY} for row in rows if "peak_step_MiB" in row]:
        report.table("peak memory, fp32, rank 8", peaks)
    many = attach_and_merge(kind, 200 if quick else 1000, 2 if quick else 5, device)
    report.table("layers of 64 x 64", many, leave_out=["run"])
    if left_out:
        print(f"The budget of {options.budget:g} minutes left out: {'; '.join(left_out)}.")
    report.write_csv(options.out / "layer.csv", rows, options.about)
    report.write_csv(options.out / "layer-attach.csv", many, options.about)
    report.plot(options.out)


def _case(text: str) -> Case:
    width, tokens, dtype, rank = text.split(",")
    if dtype not in DTYPES:
        raise argparse.ArgumentTypeError(f"the dtype must be one of {', '.join(DTYPES)}; found {dtype!r}")
    return Case(int(width), int(tokens), dtype, int(rank))


def main() -> None:
    parser = report.options_of("layer", __doc__)
    parser.add_argument("--goals", action="store_true", help="only the ratios that glora is to keep to")
    parser.add_argument("--budget", type=float, default=120.0, help="minutes, after which nothing new is begun")
    parser.add_argument("--seconds", type=float, help="of timing for each case (default: 30; quick: 4; goals: 60)")
    parser.add_argument("--cases", nargs="+", type=_case, metavar="W,N,DTYPE,R", help="not the grid: 1024,16,fp32,8")
    options = report.start(parser)
    seconds = options.seconds or (4.0 if options.quick else 60.0 if options.goals else 30.0)
    if not options.goals:
        run(options, seconds)
        return
    report.table("out=in=2048, fp32, rank 8; steps of 1024 tokens", found := goals(options.device, seconds))
    report.write_csv(options.out / "layer-goals.csv", found, options.about)


if __name__ == "__main__":
    main()
