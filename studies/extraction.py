"""Is W0 * A + B closer to real fine-tunes than B alone, at equal parameters? `python -m studies.extraction`.

Encoders are fully fine-tuned on a task, and `glora.extract` takes the nearest adapter of each form out of what the
linear layers' weights and biases became. Reported at each rank: the norm of what is left as a share of the change, over
all layers; the share of layers in which a form leaves least; and the test accuracy of the base model with the adapter
and the tuned head. Beside them: the tuned model, the base with the tuned linear layers alone (which no adapter of them
can be closer than), and the base with nothing but the tuned head.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import math
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import glora
from benchmarks import report
from benchmarks.peers import needs
from studies.accuracy.data import TASKS, splits
from studies.accuracy.methods import METHODS
from studies.accuracy.model import Classifier, Encoded, accuracy, train
from studies.accuracy.runs import MODELS
from studies.store import RESULTS, Store

# Note [Equal parameters]
# A rank is that of B alone, and every form has as many parameters as this, over all layers together. A and B together
# have half the rank each. A vector (of A, or E) of `out` numbers is paid for by one rank less of B in some layers: in
# each layer in turn, if that brings the sum nearer to that of B alone. So a layer itself has a little more or less than
# B alone there: in which layers a form is best is asked of the others only.
B, A, A_AND_B, B_AND_E, A_VECTOR = "B", "A", "A + B", "B + E", "A vector + B"
FORMS, _WITH_VECTOR = (B, A, A_AND_B, B_AND_E, A_VECTOR), (B_AND_E, A_VECTOR)
TUNED, LAYERS, BASE = "tuned", "its linear layers alone", "base, tuned head"

RANKS = (1, 2, 4, 8, 16, 32, 64)
# An elementwise A of rank 32 takes five times as long to fit as one of 16: each of its rows is a problem of 32 x 32.
HIGHEST_RANK_OF_A = 16
EXAMPLES, TEST, EPOCHS, LR = 1000, 1000, 5, 1e-4

_NO_BIAS_PATHS: dict[str, Any] = dict.fromkeys("CDE", "none")


@dataclass(frozen=True)
class Run:
    """One form at one rank, extracted; or a model beside them, of rank 0.

    Attributes:
        rank: of B alone of as many parameters (Note [Equal parameters]).
        error: what is left, as a share of what the fine-tuning changed in all adapted layers.
        best: of B, A, and A and B, the layers in which this one leaves least, in percent; nan for other forms, and
            where B is alone.
        test: accuracy in percent.
        cpu_s: seconds of the processor in extracting.
    """

    task: str
    form: str
    rank: int
    parameters: int
    error: float
    best: float
    test: float
    cpu_s: float


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned classifier beside its base.

    Attributes:
        model: the base, with the tuned head.
        state: the tuned encoder's tensors.
        test: what accuracy is measured on.
        shapes: path to (out, in) of each layer that is adapted.
    """

    model: Classifier
    state: Mapping[str, Tensor]
    test: Encoded
    shapes: Mapping[str, tuple[int, int]]


def tuned(task: str, sizes: tuple[int, int], epochs: int, cache: Path) -> Tuned:
    """Fine-tune the task's model, or take from the cache what was tuned before.

    Args:
        task: a key of TASKS.
        sizes: training and test examples.
        epochs: of full fine-tuning.
        cache: a folder for the tuned weights.
    """
    files = needs("safetensors.torch")
    pretrained = MODELS[TASKS[task].model]()
    parts = splits(task, 0, (sizes[0], 0, sizes[1]))
    file = cache / f"{task}-{sizes[0]}-{epochs}.safetensors"
    if not file.exists():
        model = pretrained.classifier(parts.classes, 0)
        train(model, METHODS["full fine-tuning"](model), pretrained.encode(parts.train), lr=LR, seed=0, epochs=epochs)
        cache.mkdir(parents=True, exist_ok=True)
        files.save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, file)
    state: dict[str, Tensor] = files.load_file(file)
    model = pretrained.classifier(parts.classes, 0).requires_grad_(False).eval()
    model.head.load_state_dict({name: state.pop(f"head.{name}") for name in ("weight", "bias")})
    encoder = {key.removeprefix("encoder."): tensor for key, tensor in state.items()}
    planned = glora.plan(model.encoder, model.targets, glora.GLoRAConfig.lora())
    shapes = {layer.path: tuple(layer.module.weight.shape) for layer in planned.layers}
    return Tuned(model, encoder, pretrained.encode(parts.test), shapes)


def configs(form: str, rank: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, glora.GLoRAConfig]:
    """A regex for each layer, and its config (Note [Equal parameters]); none where the form has no such rank.

    Example:
        >>> found = configs("A vector + B", 4, {"query": (384, 384), "key": (384, 384)})
        >>> [config.rank for config in found.values()]
        [3, 4]
        >>> configs("A + B", 1, {"query": (384, 384)})
        {}
    """
    too_high = form in (A, A_AND_B) and rank > HIGHEST_RANK_OF_A
    if too_high or (form == A_AND_B and rank % 2):
        return {}
    found: dict[str, glora.GLoRAConfig] = {}
    more = 0  # parameters than B alone has in the layers up to here
    for path, (outputs, inputs) in shapes.items():
        if form in _WITH_VECTOR:
            left = rank - (abs(more + outputs - (outputs + inputs)) <= abs(more + outputs))
            more += outputs - (rank - left) * (outputs + inputs)
            lora, vector = "lora" if left else "none", "vector"
            forms = {"A": "none", "B": lora, "E": vector} if form == B_AND_E else {"A": vector, "B": lora}
            config = glora.GLoRAConfig(**{**_NO_BIAS_PATHS, **forms}, rank=left or 1)
        elif form == A_AND_B:
            config = glora.GLoRAConfig.glora(rank=rank // 2, **_NO_BIAS_PATHS)
        else:
            config = glora.GLoRAConfig.lora(rank=rank) if form == B else glora.GLoRAConfig.hira(rank=rank)
        found[re.escape(path)] = config
    return found


@torch.no_grad()
def beside(task: str, tuned: Tuned) -> list[Run]:
    """What the adapters are read beside."""
    model = copy.deepcopy(tuned.model)
    found = {BASE: accuracy(model, tuned.test)}
    layers = {path: model.encoder.get_submodule(path) for path in tuned.shapes}
    for path, layer in layers.items():
        layer.load_state_dict({name: tuned.state[f"{path}.{name}"] for name, _ in layer.named_parameters()})
    found[LAYERS] = accuracy(model, tuned.test)
    model.encoder.load_state_dict(tuned.state)
    found[TUNED] = accuracy(model, tuned.test)
    parameters = {
        BASE: 0,
        LAYERS: sum(p.numel() for layer in layers.values() for p in layer.parameters()),
        TUNED: sum(p.numel() for p in model.encoder.parameters()),
    }
    error = {BASE: 1.0, LAYERS: 0.0, TUNED: 0.0}
    return [Run(task, each, 0, parameters[each], error[each], math.nan, found[each], 0.0) for each in found]


@torch.no_grad()
def at_rank(task: str, tuned: Tuned, rank: int, forms: Sequence[str] = FORMS) -> list[Run]:
    """Every form at this rank; the model is the base again afterwards."""
    encoder = tuned.model.encoder
    layers: dict[str, nn.Module] = {path: encoder.get_submodule(path) for path in tuned.shapes}
    changed = math.hypot(*_apart(layers, tuned).values())
    left: dict[str, dict[str, float]] = {}
    runs: list[Run] = []
    for form in forms:
        targets = configs(form, rank, tuned.shapes)
        if not targets:
            continue
        began = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            # What else the fine-tuning changed (embeddings, norms) is left as in the base, for every form alike.
            warnings.simplefilter("ignore", UserWarning)
            glora.extract(encoder, tuned.state, targets)
        seconds = time.process_time() - began
        left[form] = _apart(layers, tuned)
        parameters = sum(p.numel() for p in glora.parameters(encoder))
        with glora.merged(encoder):
            test = accuracy(tuned.model, tuned.test)
        glora.remove(encoder)
        error = math.hypot(*left[form].values()) / changed
        runs.append(Run(task, form, rank, parameters, error, 0.0, test, seconds))
    equal = [form for form in left if form not in _WITH_VECTOR]
    best = [min(equal, key=lambda form: left[form][path]) for path in layers]
    shares = {form: 100 * best.count(form) / len(best) for form in equal} if len(equal) > 1 else {}
    return [replace(run, best=shares.get(run.form, math.nan)) for run in runs]


def _apart(layers: Mapping[str, nn.Module], tuned: Tuned) -> dict[str, float]:
    """How far each layer's weight and bias, with the adapter that is attached, are from the tuned ones."""
    found: dict[str, float] = {}
    for path, layer in layers.items():
        pairs: list[tuple[Any, Tensor]] = [(layer.weight, tuned.state[f"{path}.weight"])]
        pairs += [] if layer.bias is None else [(layer.bias, tuned.state[f"{path}.bias"])]
        found[path] = math.hypot(*(torch.linalg.norm((now - then).double()).item() for now, then in pairs))
    return found


def _all(store: Store[Run], tasks: Sequence[str], ranks: Sequence[int], tune: Callable[[str], Tuned]) -> None:
    """What the store does not hold: the low ranks of all tasks first, which are the quickest."""
    kept: dict[str, Tuned] = {}
    for rank in (0, *ranks):
        for task in tasks:
            if (task, rank) in {(run.task, run.rank) for run in store.read()}:
                continue
            if task not in kept:
                kept[task] = tune(task)
            for run in at_rank(task, kept[task], rank) if rank else beside(task, kept[task]):
                store.add(run)
                print(f"{task} {run.form} {rank}: {run.error:.3f} {run.test:.1f} {run.cpu_s:.0f}s", flush=True)


# --- what is shown -------------------------------------------------------------------------------------------------


def tables(runs: Sequence[Run]) -> None:
    """Print a table for each task."""
    for task in dict.fromkeys(run.task for run in runs):
        mine = {(run.rank, run.form): run for run in runs if run.task == task}
        rows: list[dict[str, Any]] = []
        for rank in sorted({rank for rank, _ in mine if rank}):
            row: dict[str, Any] = {"rank": rank, "parameters": mine[rank, B].parameters}
            for form in FORMS:
                run = mine.get((rank, form))
                share = "" if run is None or math.isnan(run.best) else f" {run.best:3.0f}%"
                row[form] = f"{run.error:.3f}{share} {run.test:.1f}" if run else "-"
            rows.append(row)
        others = ", ".join(f"{form} {run.test:.1f}" for (rank, form), run in mine.items() if not rank)
        title = f"{task}: relative error, layers in which it is least, test accuracy (%); beside them {others}"
        if rows:
            report.table(title, rows)


_STYLES = {
    B: ("#0072B2", "D"),
    A: ("#E69F00", "s"),
    A_AND_B: ("#D55E00", "o"),
    B_AND_E: ("#56B4E9", "v"),
    A_VECTOR: ("#009E73", "^"),
}


def plot(runs: Sequence[Run], path: Path) -> None:
    """Error above, accuracy below, against parameters; a column for each task."""
    needs("matplotlib").use("Agg")
    tasks = list(dict.fromkeys(run.task for run in runs))
    figure, axes = needs("matplotlib.pyplot").subplots(
        2, len(tasks), figsize=(1 + 3.7 * len(tasks), 6.6), sharex="col", squeeze=False, layout="constrained"
    )
    for task, (above, below) in zip(tasks, axes.T, strict=True):
        for form, (color, marker) in _STYLES.items():
            mine = [run for run in runs if (run.task, run.form) == (task, form)]
            sizes = [run.parameters for run in mine]
            style = {"color": color, "marker": marker, "markersize": 5, "label": form}
            above.plot(sizes, [run.error for run in mine], **style)
            below.plot(sizes, [run.test for run in mine], **style)
        for name, dashes in ((TUNED, "-"), (LAYERS, "--"), (BASE, ":")):
            for run in runs:
                if (run.task, run.form) == (task, name):
                    below.axhline(run.test, color="grey", linestyle=dashes, linewidth=1, label=name)
        above.set(title=task, xscale="log")
        below.set(xlabel="parameters of the adapter")
        for axis in (above, below):
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("relative error")
    axes[1, 0].set_ylabel("test accuracy (%)")
    figure.suptitle("How close the nearest adapter of each form comes to a full fine-tuning, at equal parameters")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    report.save_figure(figure, path)


def main() -> None:
    """The command: runs, then the table and the plot."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.extraction", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["trec6", "movie"], metavar="TASK")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS), metavar="RANK")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="run nothing: the table and the plot of what is there")
    parser.add_argument(
        "--quick", action="store_true", help="few examples, one epoch, ranks 1 and 2, into a new folder"
    )
    parser.add_argument("--out", type=Path, help="folder of extraction.csv (default: results; quick: a new one)")
    parser.add_argument("--cache", type=Path, help="folder for tuned weights (default: one among temporary files)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    out = options.out or (Path(tempfile.mkdtemp(prefix="glora-")) if options.quick else RESULTS)
    cache = options.cache or (out if options.quick else Path(tempfile.gettempdir()) / "glora-extraction")
    sizes, epochs = ((64, 64), 1) if options.quick else ((EXAMPLES, TEST), EPOCHS)
    store = Store(out / "extraction.csv", Run, report.machine("cpu"))
    if not options.report:
        _all(
            store,
            options.tasks,
            [1, 2] if options.quick else options.ranks,
            lambda task: tuned(task, sizes, epochs, cache),
        )
    runs = sorted(store.read(), key=lambda run: run.rank)
    tables(runs)
    plot(runs, out / "extraction.png")


if __name__ == "__main__":
    main()
