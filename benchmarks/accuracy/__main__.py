"""Accuracy of GLoRA, its corners, full fine-tuning and PEFT on real texts: `python -m benchmarks.accuracy`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.accuracy.data import SEEDS, TASKS, TEST, TRAIN, VALIDATION
from benchmarks.accuracy.methods import METHODS, VARIANTS
from benchmarks.accuracy.runs import PROBE, Plan, Runs, Trainer, run_method
from benchmarks.report import RESULTS, machine


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    every = {**METHODS, **VARIANTS}
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=[PROBE, *every], default=[PROBE, *METHODS], metavar="METHOD")
    parser.add_argument("--why", action="store_true", help="GLoRA's variants in place of the methods")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="that are tested, %(default)s at most")
    parser.add_argument("--choosing", type=int, default=SEEDS, help="seeds that the learning rate is chosen on")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two methods on little data, in under three minutes")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and plots of what is there")
    parser.add_argument("--out", type=Path, help="folder of accuracy.csv and the plots (default: results)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    out = options.out or (Path(tempfile.mkdtemp(prefix="glora-")) if options.quick else RESULTS)
    if not options.report:
        run(options, out / "accuracy.csv")


def run(options: argparse.Namespace, path: Path) -> None:
    plan = Plan(options.seeds, options.choosing)
    tasks, methods = options.tasks, list(VARIANTS) if options.why else options.methods
    sizes, epochs = (TRAIN, VALIDATION, TEST), 4
    store = Runs(path, machine("cpu"))
    trainers = [Trainer(task, sizes, epochs) for task in tasks]
    each = plan.choosing * len(plan.rates) + plan.seeds
    with tqdm(total=each * len(tasks) * len(methods), unit="run", dynamic_ncols=True) as bar:
        for name in methods:
            for trainer in trainers:
                if name != PROBE:
                    run_method(trainer, name, {**METHODS, **VARIANTS}[name], plan, store, bar)
                    continue
                done = {r.seed for r in store.read() if (r.task, r.method) == (trainer.task, PROBE)}
                for seed in set(range(plan.seeds)) - done:
                    store.add(trainer.probe(seed))
                bar.update(each)


if __name__ == "__main__":
    main()
