"""A training step of a 12-layer transformer encoder with all linear layers adapted: `python -m benchmarks.model`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import glora
from benchmarks import report
from benchmarks.memory import peak_of_step
from benchmarks.peers import GLORA_A, GLORA_B, GLORA_DEFAULT, PEFT_GLORA, PEFT_LORA, needs, peft_model
from benchmarks.report import milliseconds
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


TINY = Size(layers=1, hidden=16, heads=2, batch=1, length=4, rank=2)


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


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the peak memory is to keep to."""
    whole = {row["adapters"]: row["peak_whole_MiB"] for row in rows}
    return [
        report.goal(f"peak memory: {ours} / {theirs}", (None, whole[ours] / whole[theirs], None), at_most)
        for ours in (GLORA_A, GLORA_DEFAULT)
        for theirs, at_most in ((PEFT_LORA, 1.05), (PEFT_GLORA, 0.60))
    ]


def main() -> None:
    parser = report.options_of("model", __doc__)
    parser.add_argument("--seconds", type=float, help="of timing, for all together (default: 120; quick: 10)")
    options = report.start(parser)
    size = Size(layers=2, hidden=256, heads=4, batch=2, length=64) if options.quick else Size()
    # Memory in processes of their own first, while this one is small; then the times.
    peaks = {name: peak_of_step("benchmarks.model", name, size, TINY, options.device) for name in WAYS}
    steps = {name: prepare_step(name, asdict(size), options.device) for name in WAYS}
    seconds = options.seconds or (10.0 if options.quick else 120.0)
    times = interleaved(steps, seconds=seconds, device=options.device)
    rows: list[dict[str, Any]] = []
    for name, timing in times.items():
        _, ratio, _ = timing.ratio(times[PEFT_LORA])
        row = {**asdict(size), "adapters": name, "rounds": len(timing.samples)}
        rows.append(row | milliseconds("step", timing) | {"step_to_PEFT_LoRA": ratio} | peaks[name])
    title = f"a training step of {size.layers} layers of {size.hidden}, batch {size.batch} x {size.length}, fp32, rank "
    report.table(f"{title}{size.rank}", rows, leave_out=list(asdict(size)))
    report.write_csv(options.out / "model.csv", rows, options.about)
    if not options.quick:  # the goals are for the full size, where weights outweigh the rest
        report.table("goals", found := goals(rows))
        report.write_csv(options.out / "model-goals.csv", found, options.about)


if __name__ == "__main__":
    main()
