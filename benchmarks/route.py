"""A batch for several adapters and the base: `glora.route` beside PEFT's `adapter_names`, and one adapter for all.

And a batch for adapters of five kinds, from five folders that PEFT saved (Note [PEFT's loop]).
"""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import glora
from benchmarks import report
from benchmarks.peers import needs, peft_model
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
        ("GLoRA", glora.GLoRAConfig.glora(rank=rank), "GloraConfig"),
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


# Note [PEFT's loop]
# PEFT's `adapter_names` takes one method for the whole batch, so that a batch of several methods is a loop there: a
# PeftModel for each, and each on its own samples. The loop is given what makes it fast: the samples of an adapter stand
# together, so that its part is a view of the batch; the base's samples do not go through an adapter; all models share
# one W0; eval mode, no gradients, and PEFT's cache of DoRA's norms. glora takes the same batch. What it is ahead by, or
# behind, is then the price of six passes over W0, and of PEFT's arithmetic against that of a route.
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"init_lora_weights": False}),
    "dora": ("LoraConfig", {"init_lora_weights": False, "use_dora": True}),
    "ia3": ("IA3Config", {"init_ia3_weights": False, "feedforward_modules": ["2"]}),
    "hira": ("HiraConfig", {"init_weights": False}),
    "glora": ("GloraConfig", {"init_weights": False}),
}
LOOP = "PEFT, a loop"


def kinds(width: int, batch: int, tokens: int, rank: int, device: str) -> dict[str, Callable[[], torch.Tensor]]:
    """Name to a forward of three layers, each sixth of the batch through an adapter of its own kind or the base.

    The outputs of glora and PEFT are compared first.
    """
    peft = needs("peft")
    plain: nn.Module = nn.Sequential(*(nn.Linear(width, width) for _ in range(3))).to(device).eval()

    def sharing() -> nn.Module:
        return copy.deepcopy(plain, {id(p): p for p in plain.parameters()})

    ours, peers = sharing(), list[nn.Module]()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a base whose hub name a PEFT's file does not know
        for kind, (config, options) in _KINDS.items():
            options = options | ({} if kind == "ia3" else {"r": rank})
            made = getattr(peft, config)(target_modules=["0", "1", "2"], **options)
            peer: Any = peft.get_peft_model(sharing(), made).eval()
            peer.save_pretrained(Path(folder) / kind)
            glora.interop.load_peft(ours, Path(folder) / kind, kind, trainable=False)
            peers.append(peer)
    x = torch.randn(batch, tokens, width, device=device)
    names = [name for name in (*_KINDS, None) for _ in range(batch // 6)]
    parts = x.split(batch // 6)
    caching = peft.helpers.DoraCaching

    def routed() -> torch.Tensor:
        with torch.no_grad(), glora.route(ours, names):
            return ours(x)

    def loop() -> torch.Tensor:
        with torch.no_grad(), caching():
            return torch.cat([model(part) for model, part in zip([*peers, plain], parts, strict=True)])

    def base() -> torch.Tensor:
        with torch.no_grad():
            return plain(x)

    torch.testing.assert_close(routed(), loop(), rtol=1e-4, atol=1e-4 * (loop() - base()).abs().max().item())
    return {"glora, routed": routed, LOOP: loop, "the base alone": base}


def decoding(layers: int, width: int, adapters: int, rank: int, samples: int) -> dict[str, Callable[[], object]]:
    """Name to one token of each sample through many layers, by LoRA; W0 is shared, but for the merged model's."""
    plain: nn.Module = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).eval()

    def sharing() -> nn.Module:
        return copy.deepcopy(plain, {id(p): p for p in plain.parameters()})

    names, ours = [f"adapter{number}" for number in range(adapters)], sharing()
    for name in names:
        glora.apply(ours, config=glora.GLoRAConfig.lora(rank=rank), name=name)
    peer: Any = peft_model(sharing(), "LoraConfig", rank, target_modules=[str(i) for i in range(layers)]).eval()
    for name in names:
        peer.add_adapter(name, peer.peft_config["default"])
    merged, x = copy.deepcopy(plain), torch.randn(samples, 1, width)
    owners: list[str] = [names[i % adapters] for i in range(samples)]

    def routed() -> None:
        with torch.no_grad(), glora.route(ours, owners):
            ours(x)

    def call(model: Callable[..., object], **options: object) -> Callable[[], object]:
        return torch.no_grad()(lambda: model(x, **options))

    if samples == 1:
        return {"glora": call(ours), PEFT: call(peer), MERGED: call(merged)}
    return {"glora, routed": routed, PEFT: call(peer, adapter_names=owners), MERGED: call(merged)}


PEFT, MERGED = "PEFT", "merged"


def _decoding(options: Any, seconds: float) -> None:
    torch.set_num_threads(1)
    layers, width = (2, 64) if options.quick else (24, 1024)
    rows: list[dict[str, Any]] = []
    for adapters, samples in ((1, 1), (1, 16), (4, 16), (16, 16)):
        calls = decoding(layers, width, adapters, 8, samples)
        times = interleaved(calls, seconds=seconds, clock=time.process_time)
        for name, timing in times.items():
            row: dict[str, Any] = {
                "adapters": adapters,
                "samples": samples,
                "call": name,
                "step_ms": 1e3 * timing.median,
            }
            for other in (PEFT, MERGED):
                low, ratio, high = timing.ratio(times[other])
                row |= {f"to_{other}": ratio, f"to_{other}_from": low, f"to_{other}_to": high}
            rows.append(row)
    report.table(f"one token through {layers} layers of {width}, LoRA of rank 8, CPU time on one thread", rows)


def main() -> None:
    parser = report.options_of("route", __doc__)
    parser.add_argument("--decoding", action="store_true", help="only one token through 24 layers, by CPU time")
    parser.add_argument("--kinds", action="store_true", help="only the batch for adapters of five kinds")
    parser.add_argument("--seconds", type=float, help="for each size (default: 20; quick: 2)")
    options = report.start(parser)
    seconds = options.seconds or (2.0 if options.quick else 20.0)
    if options.decoding:
        _decoding(options, seconds)
        return
    if not options.kinds:
        _adapters(options, seconds)
    _of_five_kinds(options, seconds)


def _of_five_kinds(options: Any, seconds: float) -> None:
    rows: list[dict[str, Any]] = []
    width, batch = (256, 12) if options.quick else (1024, 60)
    for tokens in [8] if options.quick else [64, 1]:
        size = {"width": width, "batch": batch, "tokens": tokens, "rank": 8}
        times = interleaved(kinds(**size, device=options.device), seconds=seconds, device=options.device)
        found: list[dict[str, Any]] = []
        for name, timing in times.items():
            low, ratio, high = timing.ratio(times[LOOP])
            row = {**size, "call": name, "rounds": len(timing.samples), "forward_ms": 1e3 * timing.median}
            found.append(row | {"forward_to_PEFT": ratio, "from": low, "to": high})
        title = f"a forward of 3 layers of {width}, batch {batch} x {tokens}, five kinds and the base"
        report.table(title, found, leave_out=list(size))
        rows += found
    report.write_csv(options.out / "route-kinds.csv", rows, options.about)


def _adapters(options: Any, seconds: float) -> None:
    width, batch = (256, 10) if options.quick else (1024, 64)
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
