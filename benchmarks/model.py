"""A training step of a transformer encoder with all linear layers adapted: `python -m benchmarks.model`.

12 layers of 768, 8 x 128 tokens; `--small` 6 layers of 384, 32 x 16. Float32, or `--bf16` for bfloat16 weights;
`--autocast` for float32 weights under bfloat16 autocast; `--compile` for compiled models. Each writes a CSV of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

import glora
from benchmarks import report
from benchmarks.memory import peak_of_step
from benchmarks.peers import GLORA_A, GLORA_B, GLORA_DEFAULT, PEFT_GLORA, PEFT_LORA, needs, peft_model
from benchmarks.report import milliseconds
from benchmarks.timing import Timing, interleaved

FULL = "full fine-tuning"
GLORA_FACTORED = "glora A=vector B=lora C, D, E"

WAYS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    GLORA_A: lambda model, rank: glora.apply(model, config=glora.GLoRAConfig.hira(rank=rank)),
    GLORA_DEFAULT: lambda model, rank: glora.apply(model, config=glora.GLoRAConfig.glora(rank=rank)),
    GLORA_B: lambda model, rank: glora.apply(model, config=glora.GLoRAConfig.lora(rank=rank)),
    GLORA_FACTORED: lambda model, rank: glora.apply(model, config=glora.GLoRAConfig.glora(A="vector", rank=rank)),
    PEFT_GLORA: lambda model, rank: peft_model(model, "GloraConfig", rank, target_modules="all-linear"),
    PEFT_LORA: lambda model, rank: peft_model(model, "LoraConfig", rank, target_modules="all-linear"),
    FULL: lambda model, _: model,
}
# The most that a ratio of two steps is to be: at 768, and at 384.
AIMS = {
    (GLORA_DEFAULT, FULL): (1.05, 1.15),
    (GLORA_B, PEFT_LORA): (0.90, 0.90),
    (GLORA_FACTORED, PEFT_LORA): (1.03, 1.03),
    (GLORA_DEFAULT, PEFT_GLORA): (0.60, 0.60),
}


@dataclass(frozen=True)
class Size:
    """The encoder's size and that of a batch, and how it computes."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    batch: int = 8
    length: int = 128
    rank: int = 8
    mode: str = "float32"
    compiled: bool = False
    blocks: str = ""
    """Compile each block by itself: a mode of torch.compile, or "aot_eager" for that backend."""


TINY = Size(layers=1, hidden=16, heads=2, batch=1, length=4, rank=2)


def prepare_step(name: str, size: dict[str, Any], device: str) -> Callable[[], object]:
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
    with torch.device(device):  # a large one would take minutes elsewhere
        bert = transformers.BertModel(config, add_pooling_layer=False)
    bert = bert.to(device, torch.bfloat16 if s.mode == "bfloat16" else torch.float32)
    model = WAYS[name](bert, s.rank).train()
    tokens = torch.randint(1000, (s.batch, s.length), device=device)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)

    run: Any = torch.compile(model) if s.compiled else model
    how: dict[str, Any] = {"backend": s.blocks} if s.blocks == "aot_eager" else {"mode": s.blocks}
    for block in bert.encoder.layer if s.blocks else ():
        block.compile(**how)

    def step() -> None:
        if s.blocks == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=s.mode == "autocast"):
            loss = run(input_ids=tokens).last_hidden_state.square().mean()
        loss.backward()
        optimizer.step()

    return step


def goals(times: dict[str, Timing], rows: list[dict[str, Any]], small: bool) -> list[dict[str, Any]]:
    """What the steps and their peak memory are to keep to."""
    found = [
        report.goal(f"step: {ours} / {theirs}", times[ours].ratio(times[theirs]), bounds[small])
        for (ours, theirs), bounds in AIMS.items()
    ]
    whole = {row["adapters"]: row["peak_whole_MiB"] for row in rows if "peak_whole_MiB" in row}
    for ours in (GLORA_A, GLORA_DEFAULT, GLORA_B, GLORA_FACTORED) if whole else ():
        ratio = (None, whole[ours] / whole[PEFT_LORA], None)
        found.append(report.goal(f"peak memory: {ours} / {PEFT_LORA}", ratio, 1.03))
    return found


def main() -> None:
    parser = report.options_of("model", __doc__)
    parser.add_argument("--small", action="store_true", help="6 layers of 384, batch 32 x 16")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--bf16", action="store_const", dest="mode", const="bfloat16", help="weights in bfloat16")
    modes.add_argument("--autocast", action="store_const", dest="mode", const="autocast", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="compiled models; no peak memory")
    parser.add_argument("--layers", type=int, help="of the encoder (default: 12; small: 6)")
    parser.add_argument("--length", type=int, help="tokens of a text (default: 128; small: 16)")
    parser.add_argument("--memory", action="store_true", help="peak memory alone")
    parser.add_argument("--seconds", type=float, help="of timing, for all together (default: 120; quick: 10)")
    options = report.start(parser)
    size = Size(layers=6, hidden=384, heads=6, batch=32, length=16) if options.small else Size()
    if options.quick:
        size = Size(layers=2, hidden=256, heads=4, batch=2, length=64)
    size = replace(
        size,
        layers=options.layers or size.layers,
        length=options.length or size.length,
        mode=options.mode or "float32",
        compiled=options.compile,
    )
    seconds = 0.0 if options.memory else options.seconds or (10.0 if options.quick else 120.0)
    # Memory in processes of their own first, while this one is small; then the times.
    peaks = (
        {}
        if size.compiled
        else {name: peak_of_step("benchmarks.model", name, size, TINY, options.device) for name in WAYS}
    )
    times: dict[str, Timing] = {}
    if seconds:
        steps = {name: prepare_step(name, asdict(size), options.device) for name in WAYS}
        times = interleaved(steps, seconds=seconds, device=options.device)
    rows: list[dict[str, Any]] = []
    for name in WAYS:
        row: dict[str, Any] = {**asdict(size), "adapters": name}
        if times:
            row |= {"rounds": len(times[name].samples), **milliseconds("step", times[name])}
            for other in (PEFT_LORA, PEFT_GLORA, FULL):
                low, row[f"step_to_{other}"], high = times[name].ratio(times[other])
                row |= {f"{other}_low": low, f"{other}_high": high}
        rows.append(row | peaks.get(name, {}))
    of = f"{size.layers} layers of {size.hidden}, batch {size.batch} x {size.length}, {size.mode}, rank {size.rank}"
    report.table(f"a training step of {of}{', compiled' * size.compiled}", rows, leave_out=list(asdict(size)))
    kind = "".join(f"-{word}" for word in _kind(options, size))
    report.write_csv(options.out / f"model{kind}.csv", rows, options.about)
    if times and not options.quick:
        report.table("goals", found := goals(times, rows, options.small))
        report.write_csv(options.out / f"model-goals{kind}.csv", found, options.about)


def _kind(options: argparse.Namespace, size: Size) -> list[str]:
    """What tells this run's files from those of a run without options."""
    words = {"small": options.small, size.mode: size.mode != "float32", "compiled": size.compiled}
    words |= {f"{size.layers}-layers": options.layers is not None}
    words |= {f"{size.batch * size.length}-tokens": options.length is not None}
    return [word for word, said in words.items() if said]


if __name__ == "__main__":
    main()
