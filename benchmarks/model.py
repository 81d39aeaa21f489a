"""A training step of a 12-layer transformer encoder with all linear layers adapted: `python -m benchmarks.model`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import glora
from benchmarks import report
from benchmarks.memory import Peak, peak_of_step
from benchmarks.peers import GLORA_A, GLORA_B, GLORA_DEFAULT, PEFT_GLORA, PEFT_LORA, needs, peft_model
from benchmarks.report import Goal, mebibytes, seconds
from benchmarks.timing import interleaved

WAYS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    GLORA_A: lambda model, rank: glora.apply(model, config=glora.GLoRAConfig.hira(rank=rank)),
    GLORA_DEFAULT: lambda model, rank: glora.apply(model, config=glora.GLoRAConfig(rank=rank)),
    GLORA_B: lambda model, rank: glora.apply(model, config=glora.GLoRAConfig.lora(rank=rank)),
    PEFT_GLORA: lambda model, rank: peft_model(model, "GloraConfig", rank, target_modules="all-linear"),
    PEFT_LORA: lambda model, rank: peft_model(model, "LoraConfig", rank, target_modules="all-linear"),
}


@dataclass(frozen=True)
class Size:
    """The encoder's size and that of a batch."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    batch: int = 8
    length: int = 128
    rank: int = 8


def prepare_step(name: str, size: dict[str, int], device: str) -> Callable[[], object]:
    """A training step, optimizer included, of an encoder with random weights, adapted in this way."""
    s = Size(**size)
    transformers = needs("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=1000,  # the embeddings train in no way, and would only add the same bytes to all
        hidden_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        intermediate_size=4 * s.hidden,
        max_position_embeddings=max(s.length, 8),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = WAYS[name](transformers.BertModel(config, add_pooling_layer=False).to(device), s.rank).train()
    tokens = torch.randint(1000, (s.batch, s.length), device=device)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens).last_hidden_state.square().mean().backward()
        optimizer.step()

    return step


def peak(name: str, size: Size, device: str) -> Peak:
    """Peak memory of the step, in a fresh process."""
    tiny = Size(layers=1, hidden=16, heads=2, batch=1, length=4, rank=2)
    jobs = [{"name": name, "size": asdict(each), "device": device} for each in (size, tiny)]
    return peak_of_step("benchmarks.model:prepare_step", *jobs, device=device, threads=torch.get_num_threads())


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """What the peak memory is to keep to."""
    whole = {row["peer"]: row["whole"] for row in rows}
    found: list[Goal] = []
    for ours in (GLORA_A, GLORA_DEFAULT):
        for theirs, at_most in ((PEFT_LORA, 1.05), (PEFT_GLORA, 0.60)):
            if ours in whole and theirs in whole:
                found.append(Goal(f"peak memory: {ours} / {theirs}", whole[ours] / whole[theirs], at_most))
    return found


def run(options: argparse.Namespace) -> None:
    """Memory in processes of their own first, while this one is small; then the times."""
    size = Size(options.layers, options.hidden, options.heads, options.batch, options.length, options.rank)
    peaks = {name: peak(name, size, options.device) for name in options.ways}
    steps = {name: prepare_step(name, asdict(size), options.device) for name in options.ways}
    times = interleaved(steps, seconds=options.seconds, device=options.device)
    base = PEFT_LORA if PEFT_LORA in times else options.ways[0]
    rows: list[dict[str, Any]] = []
    lines: list[list[str]] = []
    for name, timing in times.items():
        low, high = timing.quartiles
        ratio = timing.ratio(times[base]).median
        rows.append({"peer": name, "median": timing.median, "low": low, "high": high, "rounds": len(timing.samples)})
        rows[-1] |= {"time_ratio": ratio, **asdict(peaks[name])}
        lines.append(
            [
                name,
                seconds(timing.median),
                f"{seconds(low)} - {seconds(high)}",
                f"{ratio:.2f}",
                mebibytes(peaks[name].step),
                mebibytes(peaks[name].whole),
                f"{peaks[name].whole / peaks[base].whole:.2f}",
            ]
        )
    report.table(
        f"a training step of {size.layers} layers of {size.hidden}, batch {size.batch} x {size.length}, fp32, rank "
        f"{size.rank}; ratios to {base}",
        ["adapters", "step", "quartiles", "x", "memory of the step", "with weights", "x"],
        lines,
    )
    found = [] if options.quick else goals(rows)  # the goals are for the full size, where weights outweigh the rest
    if found:
        report.print_goals("goals", found)
    report.write_json(
        options.out / "model.json",
        {
            "machine": report.facts(options.device),
            "units": {"times": "seconds of one step", "memory": "bytes", "ratio": f"to {base}"},
            "size": asdict(size),
            "adapters": rows,
            "goals": [asdict(goal) | {"met": goal.met} for goal in found],
        },
    )
    report.bars(
        options.out / "model.png",
        {
            "seconds of a training step (median)": {row["peer"]: row["median"] for row in rows},
            "peak memory, weights included (MiB)": {row["peer"]: row["whole"] / 2**20 for row in rows},
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=(__doc__ or "").partition(":")[0])
    report.common_options(parser)
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--{name}", type=int, help=f"(default: {value})")
    parser.add_argument("--seconds", type=float, help="of timing, for all together (default: 120; quick: 10)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    options = parser.parse_args()
    defaults = Size(layers=2, hidden=256, heads=4, batch=2, length=64) if options.quick else Size()
    for name, value in asdict(defaults).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.seconds = options.seconds or (10.0 if options.quick else 120.0)
    report.start(options.device, options.threads)
    run(options)


if __name__ == "__main__":
    main()
