"""Everything that an accelerator is to be asked, in one run of at most 8 minutes: `python -m benchmarks.device`.

It needs a CUDA device (`--device cpu --quick` rehearses it at tiny sizes) and writes `device-<card>.csv`. No such file
among the results means that no card has been measured.

Columns: `part` is correctness (the largest relative error of outputs and gradients beside `glora.functional` in
float64, and its `limit`), step or decoding (the ratio of two times, with its quartiles), or memory (the ratio of two
peaks). `ours` and `theirs` are milliseconds or MiB. `note` says why a row has no value: an error, or no time left.
Blocks of a model are compiled one by one, so that twelve equal ones take the time of one.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glora
from benchmarks import report, route
from benchmarks.memory import peak_of_step
from benchmarks.model import FULL, GLORA_FACTORED, TINY, Size, prepare_step
from benchmarks.peers import GLORA_A, GLORA_B, GLORA_DEFAULT, PEFT_GLORA, PEFT_LORA
from benchmarks.timing import interleaved
from glora.kernels import row_blocks

Row = dict[str, Any]

_EMPTY: Row = dict.fromkeys(
    ["part", "of", "mode", "how", "what", "value", "low", "high", "limit", "ok", "ours", "theirs", "note"]
)

# --- correctness ---------------------------------------------------------------------------------------------------

# Name to the weights' dtype, autocast's, and the relative errors allowed to outputs and to gradients.
MODES: dict[str, tuple[torch.dtype, torch.dtype | None, float, float]] = {
    "float32": (torch.float32, None, 1e-5, 1e-5),
    "bfloat16": (torch.bfloat16, None, torch.finfo(torch.bfloat16).eps, 0.03),
    "float16": (torch.float16, None, torch.finfo(torch.float16).eps, 0.03),
    "autocast": (torch.float32, torch.bfloat16, torch.finfo(torch.bfloat16).eps, 0.03),
}


@dataclass(frozen=True)
class Check:
    """A form whose layer takes a certain kernel, and how it is called.

    Attributes:
        config: of the adapter.
        tokens: of each of four samples.
        grad: with gradients.
        routed: the samples go through two adapters.
    """

    config: glora.GLoRAConfig
    tokens: int = 32
    grad: bool = True
    routed: bool = False


_VECTOR, _LORA = glora.GLoRAConfig.glora(A="vector", rank=4), glora.GLoRAConfig.lora(rank=4)
CHECKS: dict[str, Check] = {
    "factored, B lora": Check(_LORA),
    "factored, A vector": Check(_VECTOR),
    "factored, few tokens": Check(_LORA, tokens=1),
    "factored, matmul": Check(glora.GLoRAConfig.glora(product="matmul", rank=4)),
    "blockwise": Check(glora.GLoRAConfig.glora(rank=4)),
    "blockwise, few tokens": Check(glora.GLoRAConfig.glora(rank=4), tokens=1),
    "expanded": Check(glora.GLoRAConfig.glora(rank=4), tokens=1, grad=False),
    "samplewise, B lora": Check(_LORA, routed=True),
    "samplewise, A vector": Check(_VECTOR, routed=True),
    "row blocks, path C": Check(glora.GLoRAConfig.prompt()),
}
COMPILED = ("factored, B lora", "factored, A vector", "blockwise")


def check(name: str, mode: str, device: str, backend: str | None = None) -> Row:
    """The largest relative errors of one kernel's outputs and gradients; compiled, if a backend is given."""
    torch.manual_seed(0)
    case, (dtype, half, *limits) = CHECKS[name], MODES[mode]
    layer = nn.Linear(96, 160, dtype=dtype, device=device)
    adapters = ("a", "b") if case.routed else ("a",)
    for adapter in adapters:
        glora.apply(layer, config=replace(case.config, init="random"), name=adapter)
    glora.activate(layer, dict.fromkeys(adapters, 1.0))  # so that both ask for gradients
    x = torch.randn(4, case.tokens, 96, device=device).to(dtype).requires_grad_(case.grad)
    g = torch.randn(4, case.tokens, 160, device=device).to(half or dtype)
    sources = [x, *(p for p in layer.parameters() if p.requires_grad)] if case.grad else []
    call: Any = torch.compile(layer, backend=backend) if backend else layer
    names = ["a", "b", "b", "a"]
    inside = glora.route(layer, names) if case.routed else contextlib.nullcontext()
    # Several blocks, the last one smaller.
    blocks = mock.patch.multiple(row_blocks, CPU_BLOCK=96 * 64, CUDA_BLOCK=96 * 64)
    with blocks, torch.set_grad_enabled(case.grad):
        with inside, torch.autocast(torch.device(device).type, half, enabled=half is not None):
            y = call(x)
        found = [y, *(torch.autograd.grad(y, sources, g) if case.grad else ())]
    exact = _exact(layer, x, g, names if case.routed else ["a"] * 4, len(sources))
    errors = [
        float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in zip(found, exact, strict=True)
    ]
    worst = max(error / limit for error, limit in zip(errors, [limits[0]] + [limits[1]] * len(sources), strict=True))
    # As a share of what is allowed, since outputs and gradients have limits of their own.
    how = "compiled" if backend else "eager"
    values = {"value": worst, "limit": 1.0, "ok": "yes" if worst <= 1 else "no"}  # a NaN is a no
    return _EMPTY | {"part": "correctness", "of": name, "mode": mode, "how": how, "what": "error / limit"} | values


def _exact(layer: nn.Module, x: Tensor, g: Tensor, names: Sequence[str], sources: int) -> list[Tensor]:
    """Outputs and gradients by the dense formula in float64: `layer.weight` takes no kernel."""
    wide = copy.deepcopy(layer).double()
    X, parts = x.detach().double().requires_grad_(), list[Tensor]()
    factors = [p for p in wide.parameters() if p.requires_grad]
    for row, name in zip(X, names, strict=True):
        glora.activate(wide, name)
        parts.append(F.linear(row, wide.weight, wide.bias))
    y = torch.stack(parts)
    glora.activate(wide, dict.fromkeys(names, 1.0))
    return [y, *(torch.autograd.grad(y, [X, *factors], g.double()) if sources else ())]


# --- times and memory ----------------------------------------------------------------------------------------------

# The steps that are timed side by side: ours, and what they are compared with. A group is in memory at a time.
GROUPS: dict[str, tuple[str, ...]] = {
    PEFT_LORA: (GLORA_B, GLORA_FACTORED),
    PEFT_GLORA: (GLORA_DEFAULT,),
    FULL: (GLORA_A,),
}


def steps(theirs: str, size: Size, device: str, seconds: float) -> list[Row]:
    """Training steps of a group, as ratios to its peer's."""
    names = (*GROUPS[theirs], theirs)
    calls = {name: prepare_step(name, asdict(size), device) for name in names}
    times = interleaved(calls, seconds=seconds, device=device)
    rows: list[Row] = []
    for ours in GROUPS[theirs]:
        low, value, high = times[ours].ratio(times[theirs])
        row = {"part": "step", **_said(size), "what": f"{ours} / {theirs}", "value": value, "low": low, "high": high}
        rows.append(_EMPTY | row | {"ours": 1e3 * times[ours].median, "theirs": 1e3 * times[theirs].median})
    return rows


def _said(size: Size) -> Row:
    return {"of": f"{size.layers} layers of {size.hidden}", "mode": size.mode, "how": size.blocks or "eager"}


def memory(size: Size, device: str, _: float) -> list[Row]:
    """Peak memory of steps, weights included, as a ratio to PEFT's LoRA."""
    names = (PEFT_LORA, GLORA_B, GLORA_FACTORED, GLORA_DEFAULT)
    peaks = {n: peak_of_step("benchmarks.model", n, size, TINY, device)["peak_whole_MiB"] for n in names}
    theirs = peaks.pop(PEFT_LORA)
    return [
        _EMPTY
        | {"part": "memory", **_said(size), "what": f"{name} / {PEFT_LORA}"}
        | {"value": ours / theirs, "ours": ours, "theirs": theirs}
        for name, ours in peaks.items()
    ]


def decoding(width: int, adapters: int, dtype: torch.dtype, device: str, seconds: float) -> list[Row]:
    """One token of each of 16 samples through three layers, beside PEFT's `adapter_names`."""
    calls = route.subjects(width, 16, 1, adapters, 8, device, dtype)
    times = interleaved(calls, seconds=seconds, device=device)
    rows: list[Row] = []
    for name in times:
        ours, _, way = name.partition(", ")
        theirs = f"{ours.replace('glora', 'PEFT')}, names"
        if way != "routed":
            continue
        low, value, high = times[name].ratio(times[theirs])
        row = {"part": "decoding", "of": f"3 layers of {width}, {adapters} adapters", "mode": str(dtype)[6:]}
        row |= {"how": way, "what": f"{ours} / {theirs}", "value": value, "low": low, "high": high}
        rows.append(_EMPTY | row | {"ours": 1e3 * times[name].median, "theirs": 1e3 * times[theirs].median})
    return rows


# --- the run -------------------------------------------------------------------------------------------------------

# Note [A run that ends]
# Only the seconds of timing can be chosen; building and compiling take what they take. So tasks stand in the order of
# what is wanted most. Each may time for its share of what is left, and is begun only where the dearest task of its kind
# so far would still fit; what is not begun has a row that says so.


@dataclass(frozen=True)
class Task:
    """Some rows.

    Attributes:
        kind: tasks of one kind cost about the same.
        row: what stands in the table if there is no result.
        run: makes the rows; takes the seconds of timing.
        guess: seconds that the first task of its kind may take.
    """

    kind: str
    row: Row
    run: Callable[[float], list[Row]]
    guess: float


def run_all(
    tasks: Sequence[Task], seconds: float, timing: float = 10.0, clock: Callable[[], float] = time.monotonic
) -> list[Row]:
    """The rows of all tasks, in order (Note [A run that ends]); none may time for longer than `timing`."""
    end, dearest, rows = clock() + seconds, dict[str, float](), list[Row]()
    for number, task in enumerate(tasks):
        begin = clock()
        left = end - begin
        if left < dearest.get(task.kind, task.guess):
            rows.append(_EMPTY | task.row | {"note": "no time left"})
            continue
        try:
            rows += task.run(min(timing, left / (len(tasks) - number) / 2))
        except Exception as error:  # whatever it is, the rest of the run is worth having
            told = (str(error).strip() or "-").splitlines()[0][:160]
            rows.append(_EMPTY | task.row | {"ok": "no", "note": f"{type(error).__name__}: {told}"})
        with contextlib.suppress(Exception):  # after some errors CUDA answers no call, and the rows are to be kept
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()  # does nothing where there is no CUDA
        dearest[task.kind] = max(dearest.get(task.kind, 0.0), clock() - begin)
    return rows


def tasks_of(device: str, quick: bool) -> list[Task]:
    """All tasks, the one that is wanted most first."""
    sizes = [Size(layers=12, hidden=1024, heads=16), Size(layers=8, hidden=4096, heads=32)]
    modes, compilers = ["bfloat16", "autocast", "float32"], ["default", "reduce-overhead"]
    width, backend, compiled_modes, compiled_groups = 1024, "inductor", list(MODES), list(GROUPS)
    if quick:  # inductor would take minutes on a CPU
        sizes, modes = [Size(layers=1, hidden=32, heads=2, batch=2, length=8, rank=2)], ["bfloat16"]
        compilers, width, backend, compiled_modes, compiled_groups = (
            ["aot_eager"],
            32,
            "aot_eager",
            ["autocast"],
            [FULL],
        )

    def checks(kind: str, names: Sequence[str], backend: str | None, guess: float) -> list[Task]:
        row = {"part": "correctness", "how": "compiled" if backend else "eager"}
        return [
            Task(kind, row | {"of": n, "mode": m}, partial(lambda n, m, _: [check(n, m, device, backend)], n, m), guess)
            for n in names
            for m in (compiled_modes if backend else MODES)
        ]

    def timed(size: Size, theirs: str) -> Task:
        row = {"part": "step", **_said(size), "what": f"{', '.join(GROUPS[theirs])} / {theirs}"}
        guess = 0.0 if quick else 45.0 if size.blocks else 15.0
        return Task(f"step {row['of']} {bool(size.blocks)}", row, partial(steps, theirs, size, device), guess)

    tasks = checks("check", list(CHECKS), None, 0.0)
    tasks += [timed(replace(size, mode=mode), theirs) for size in sizes for mode in modes[:2] for theirs in GROUPS]
    for adapters in (1, 16):
        row = {"part": "decoding", "of": f"3 layers of {width}, {adapters} adapters"}
        run = partial(decoding, width, adapters, torch.float32 if quick else torch.bfloat16, device)
        tasks.append(Task("decoding", row, run, 0.0))
    size = replace(sizes[0], mode=modes[0])
    tasks.append(Task("memory", {"part": "memory", **_said(size)}, partial(memory, size, device), 0.0))
    tasks += checks("compiled check", COMPILED, backend, 0.0 if quick else 20.0)
    for size in sizes:
        for how in compilers:
            tasks += [timed(replace(size, mode=modes[0], blocks=how), theirs) for theirs in compiled_groups]
    tasks += [timed(replace(size, mode=mode), theirs) for size in sizes for mode in modes[2:] for theirs in GROUPS]
    return tasks + [
        timed(replace(size, mode=mode, blocks=how), theirs)
        for size in sizes
        for mode in modes[1:]
        for how in compilers
        for theirs in GROUPS
    ]


def card(device: str) -> str:
    """The device's name, as part of a file's."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> None:
    parser = report.options_of("device", __doc__)
    parser.set_defaults(device="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="for the whole run (default: 8)")
    options = report.start(parser)
    rows = run_all(tasks_of(options.device, options.quick), 60 * options.minutes, 0.1 if options.quick else 10.0)
    print(options.about)
    report.table(f"glora on {card(options.device)}", rows)
    report.write_csv(options.out / f"device-{card(options.device)}.csv", rows, options.about)
    if wrong := [row for row in rows if row["ok"] == "no"]:
        raise SystemExit(f"{len(wrong)} of {len(rows)} rows are wrong, or failed: see `ok` and `note`.")


if __name__ == "__main__":
    main()
