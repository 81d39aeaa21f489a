"""Accuracy of GLoRA, its corners, full fine-tuning and PEFT on real texts and images: `python -m benchmarks.accuracy`.

Without options: every method, task and learning rate, three seeds each: a day of one core. It may be stopped and called
again, with other options too: a run that accuracy.csv holds is not made again. `--choosing 1` picks the learning rate
on the first seed alone: half the runs. `--report` runs nothing, and makes the tables and plots of what is there; with
`--tasks`, of these tasks: a mean is over the methods that were run on each.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.accuracy import plots, tables
from benchmarks.accuracy.data import SEEDS, TASKS, TEST, TRAIN, VALIDATION
from benchmarks.accuracy.methods import METHODS, VARIANTS
from benchmarks.accuracy.model import EPOCHS
from benchmarks.accuracy.runs import LEARNING_RATES, PROBE, Plan, Runs, Trainer, read, run_method
from benchmarks.report import RESULTS, machine

EVERY = {**METHODS, **VARIANTS}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=[PROBE, *EVERY], default=[PROBE, *METHODS], metavar="METHOD")
    parser.add_argument("--why", action="store_true", help="GLoRA's variants in place of the methods")
    parser.add_argument("--lr", type=float, help="test at this learning rate, and choose none")
    parser.add_argument("--choosing", type=int, default=SEEDS, help="seeds that the learning rate is chosen on")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="three methods on little data, in under three minutes")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and plots of what is there")
    parser.add_argument(
        "--out", type=Path, help="folder of accuracy.csv and plots (default: results; quick: a new one)"
    )
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    out: Path = options.out or (Path(tempfile.mkdtemp(prefix="glora-")) if options.quick else RESULTS)
    store = Runs(out / "accuracy.csv", machine("cpu"))
    if options.quick:
        # Two seeds, since an interval takes two.
        trainers = [Trainer("trec6", (128, 100, 200), epochs=2)]
        run([PROBE, "LoRA r8", "GLoRA r3"], trainers, Plan(seeds=2, choosing=1), store)
    elif not options.report:
        trainers = [Trainer(task, (TRAIN, VALIDATION, TEST), EPOCHS) for task in options.tasks]
        methods = list(VARIANTS) if options.why else options.methods
        run(methods, trainers, Plan(SEEDS, options.choosing, LEARNING_RATES), store, options.lr)
    runs = [run for run in read(store.path) if run.task in options.tasks]
    tables.tables(runs, out / "accuracy-memory.csv")
    plots.plots(runs, out)


def run(methods: Sequence[str], trainers: Sequence[Trainer], plan: Plan, store: Runs, lr: float | None = None) -> None:
    """All methods on all tasks, but for what the file holds."""
    each = plan.seeds if lr else plan.choosing * len(plan.rates) + plan.seeds
    with tqdm(total=each * len(trainers) * len(methods), unit="run", dynamic_ncols=True) as bar:
        for name in methods:
            for trainer in trainers:
                if name == PROBE:
                    done = {run.seed for run in store.read() if (run.task, run.method) == (trainer.task, PROBE)}
                    for seed in sorted(set(range(plan.seeds)) - done):
                        store.add(trainer.probe(seed))
                    bar.update(each)
                else:
                    run_method(trainer, name, EVERY[name], plan, store, bar, lr)


if __name__ == "__main__":
    main()
