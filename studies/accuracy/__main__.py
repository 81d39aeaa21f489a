"""Test accuracy of LoRA, full fine-tuning and GLoRA's paths on real texts and images: `python -m studies.accuracy`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from benchmarks.report import machine
from studies.accuracy.data import SEEDS, TASKS, TEST, TRAIN, VALIDATION
from studies.accuracy.methods import METHODS
from studies.accuracy.runs import EPOCHS, Run, Trainer, wanted
from studies.store import RESULTS, Store


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.accuracy", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--examples", type=int, default=TRAIN)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    store = Store(options.out / "accuracy.csv", Run, machine("cpu"))
    trainers = {task: Trainer(task, (options.examples, VALIDATION, TEST), EPOCHS) for task in options.tasks}
    while True:
        runs = [run for run in store.read() if run.examples == options.examples]
        following = next(wanted(runs, options.tasks, options.methods, options.seeds), None)
        if following is None:
            break
        task, method, seed, lr = following
        run = trainers[task].run(method, METHODS[method], seed, lr)
        store.add(run)
        print(f"{task} {method} {seed} {lr:g}: {run.validation:.1f} {run.test:.1f} {run.cpu_s:.0f}s", flush=True)


if __name__ == "__main__":
    main()
