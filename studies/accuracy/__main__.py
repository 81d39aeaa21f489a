"""Test accuracy of GLoRA's paths beside LoRA, on real texts and images: `python -m studies.accuracy`.

Every task, method and seed takes half a minute to two minutes of one core; all of them take many hours. It may be
stopped and called again, with other options too: a run that accuracy.csv holds is not made again. `--report` runs
nothing, and makes the table and the plot of what is there.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.report import machine
from studies.accuracy import plots, tables
from studies.accuracy.data import SEEDS, TASKS, TEST, TRAIN, VALIDATION
from studies.accuracy.methods import METHODS
from studies.accuracy.model import EPOCHS
from studies.accuracy.runs import Run, Trainer, wanted
from studies.store import RESULTS, Store

DEFAULT = ["LoRA r8", "A r8", "A + B r4"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=DEFAULT, metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of data and start (default: %(default)s)")
    parser.add_argument("--examples", type=int, default=TRAIN, help="to train on (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two methods on little data, in under three minutes")
    parser.add_argument("--report", action="store_true", help="run nothing: the table and the plot of what is there")
    parser.add_argument("--out", type=Path, help="folder of accuracy.csv (default: studies/results; quick: a new one)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    out: Path = options.out or (Path(tempfile.mkdtemp(prefix="glora-")) if options.quick else RESULTS)
    store = Store(out / "accuracy.csv", Run, machine("cpu"))
    tasks, methods, seeds, sizes, epochs = (
        options.tasks,
        options.methods,
        options.seeds,
        (options.examples, VALIDATION, TEST),
        EPOCHS,
    )
    if options.quick:
        tasks, methods, seeds, sizes, epochs = ["trec6"], ["LoRA r8", "A r8"], 2, (128, 100, 200), 2
    if not options.report:
        run(store, tasks, methods, seeds, sizes, epochs)
    runs = [each for each in store.read() if each.examples == sizes[0]]
    shown = [task for task in tasks if any(each.task == task for each in runs)]
    tables.markdown(
        "Test accuracy in percent; in brackets, 95% intervals over seeds", tables.rows(runs, shown, list(METHODS))
    )
    plots.plot(runs, shown, list(METHODS), out / "accuracy.png")


def run(
    store: Store[Run], tasks: list[str], methods: list[str], seeds: int, sizes: tuple[int, int, int], epochs: int
) -> None:
    """All runs that the file does not hold."""
    trainers = {task: Trainer(task, sizes, epochs) for task in tasks}
    with tqdm(unit="run", dynamic_ncols=True) as bar:
        while True:
            runs = [each for each in store.read() if each.examples == sizes[0]]
            left = list(wanted(runs, tasks, methods, seeds))
            if not left:
                return
            bar.total = bar.n + len(left)
            task, method, seed, lr = left[0]
            bar.set_description(f"{task}, {method}, seed {seed}, lr {lr:g}")
            store.add(trainers[task].run(method, METHODS[method], seed, lr))
            bar.update()


if __name__ == "__main__":
    main()
