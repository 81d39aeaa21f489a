"""What the benchmarks share: options, tables, CSV and plots. `python -m benchmarks.report` draws the plots anew."""

from __future__ import annotations

import argparse
import csv
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import glora
from benchmarks.peers import GLORA_A, GLORA_B, GLORA_DEFAULT, GLORA_VECTOR, PEFT_GLORA, PEFT_LORA, TRAINED, needs
from benchmarks.timing import Timing

RESULTS = Path(__file__).parent / "results"

# --- options and the machine -------------------------------------------------------------------------------------


def options_of(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m benchmarks.{name}` with the options that all benchmarks share."""
    summary = (description or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=summary)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0 (default: cpu)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads on the CPU (default: 2)")
    parser.add_argument("--quick", action="store_true", help="small sizes, in under three minutes")
    parser.add_argument("--out", type=Path, help="folder for CSV and plots (default: results; quick: a new one)")
    return parser


def start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse, set the threads, and fail now rather than at the end. Adds `about`, the first line of each CSV."""
    options = parser.parse_args()
    needs("matplotlib")
    torch.set_num_threads(options.threads)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {options.device}: torch finds no CUDA device here.")
    options.about = f"{machine(options.device)}; {_command(parser.prog, sys.argv[1:])}"
    options.out = options.out or (Path(tempfile.mkdtemp(prefix="glora-")) if options.quick else RESULTS)
    return options


def machine(device: str) -> str:
    """What a reader must know to read the times; nothing that tells whose machine it is."""
    if torch.device(device).type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        name = f"{_cpu()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}", f"glora {glora.__version__}"]
    versions += [f"{package} {_version(package)}" for package in ("peft", "lycoris-lora", "transformers")]
    return f"{name}, {platform.system()} {platform.machine()}; {', '.join(versions)}"


def _command(program: str, arguments: Sequence[str]) -> str:
    """The command without its `--out`, which changes no figure."""
    pairs = zip(["", *arguments], arguments, strict=False)
    kept = [argument for before, argument in pairs if before != "--out" and not argument.startswith("--out")]
    return " ".join([program, *kept])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# --- rows: each a dict of column to value, with the unit in the column's name --------------------------------------


def milliseconds(what: str, timing: Timing) -> dict[str, float]:
    """Columns for the median and the quartiles of a time."""
    low, high = timing.quartiles
    return {f"{what}_ms": 1e3 * timing.median, f"{what}_low_ms": 1e3 * low, f"{what}_high_ms": 1e3 * high}


Quartiles = tuple[float | None, float, float | None]


def goal(what: str, ratio: Quartiles, bound: float, *, equal: bool = False) -> dict[str, Any]:
    """A row for a ratio (low quartile, median, high) that is to be at most `bound`, or equal: between the quartiles."""
    low, median, high = ratio
    met = (low or median) <= bound <= (high or median) if equal else median <= bound
    columns = {"ratio": what, "median": median, "low": low, "high": high}
    return columns | {"goal": f"{'=' if equal else '<='} {bound:.2f}", "met": "yes" if met else "no"}


def text(value: Any) -> str:
    """
    Example:
        >>> text(0.012345), text(12345.6), text(12345), text(None)
        ('0.0123', '12300', '12345', '')
    """
    if isinstance(value, float):
        digits = f"{value:#.3g}".rstrip(".")
        return f"{float(digits):.0f}" if "e+" in digits else digits
    return "" if value is None else str(value)


def table(title: str, rows: Sequence[Mapping[str, Any]], *, leave_out: Sequence[str] = ()) -> None:
    """Print rows, without the columns that the title tells."""
    columns = [column for column in rows[0] if column not in leave_out]
    lines = [columns, *([text(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], about: str) -> None:
    """Write rows of three digits under a comment of one line, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="") as file:
        file.write(f"# {about}\n")
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({column: text(value) for column, value in row.items()} for row in rows)
    print(f"wrote {path}")


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows that `write_csv` wrote, as text; "" where a row has no such value."""
    with path.open(newline="") as file:
        file.readline()
        return list(csv.DictReader(file))


# --- plots -------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which the colour-blind tell apart; markers and dashes tell the same.
_LINES: dict[str, tuple[str, str, str]] = {
    GLORA_DEFAULT: ("#D55E00", "o", "-"),
    GLORA_A: ("#E69F00", "s", "-"),
    GLORA_VECTOR: ("#009E73", "^", "-"),
    GLORA_B: ("#0072B2", "D", "-"),
    PEFT_LORA: ("#56B4E9", "v", "--"),
    PEFT_GLORA: ("#CC79A7", "X", "--"),
}
_LABELS = {
    GLORA_DEFAULT: "glora default (A, B lora; C, D, E)",
    GLORA_A: "glora A lora",
    GLORA_VECTOR: "glora A vector, B lora",
    GLORA_B: "glora B lora",
}


def plot(folder: Path) -> None:
    """Draw `layer-training.png` and `layer-memory.png` from `layer.csv` of this folder: fp32, rank 8, its first run."""
    rows = read_csv(folder / "layer.csv")
    rows = [r for r in rows if (r["run"], r["dtype"], r["rank"]) == (rows[0]["run"], "fp32", "8")]
    _plot_training(folder / "layer-training.png", _ratios(rows, "step_ms"))
    _plot_memory(folder / "layer-memory.png", _ratios(rows, "peak_step_MiB"))


def _ratios(rows: Sequence[Mapping[str, str]], column: str) -> dict[int, dict[str, list[tuple[int, float]]]]:
    """Width to layer to pairs of tokens and ratio to the trained nn.Linear."""
    values = {(int(r["width"]), int(r["tokens"]), r["layer"]): float(r[column]) for r in rows if r.get(column)}
    found: dict[int, dict[str, list[tuple[int, float]]]] = {}
    for (width, tokens, layer), value in sorted(values.items()):
        if layer in _LINES and (width, tokens, TRAINED) in values:
            lines = found.setdefault(width, {name: [] for name in _LINES})
            lines[layer].append((tokens, value / values[width, tokens, TRAINED]))
    return found


def _plot_training(path: Path, ratios: Mapping[int, Mapping[str, Sequence[tuple[int, float]]]]) -> None:
    if not ratios:
        return
    figure, axes = _panels(len(ratios), height=4.2)
    tokens = sorted({point[0] for lines in ratios.values() for points in lines.values() for point in points})
    for axis, (width, lines) in zip(axes, ratios.items(), strict=True):
        for name, (color, marker, dashes) in _LINES.items():
            label = _LABELS.get(name, name)
            axis.plot(*zip(*lines[name], strict=True), dashes, color=color, marker=marker, markersize=5, label=label)
        axis.axhline(1, color="black", linewidth=1, zorder=1)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"out = in = {width}")
        axis.set_xticks(tokens, map(str, tokens))
        axis.set_yticks(ticks := [0.1, 0.2, 0.5, 1, 2, 5, 10], [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time of a training step,\nas a ratio to a trained nn.Linear's")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    save_figure(figure, path)


def _plot_memory(path: Path, ratios: Mapping[int, Mapping[str, Sequence[tuple[int, float]]]]) -> None:
    if not ratios:
        return
    figure, axes = _panels(len(ratios), height=2.8)
    for axis, (width, lines) in zip(axes, ratios.items(), strict=True):
        names = [name for name in _LINES if lines[name]]
        found = axis.barh(
            [_LABELS.get(name, name).partition(" (")[0] for name in names],
            [lines[name][-1][1] for name in names],
            color=[_LINES[name][0] for name in names],
        )
        axis.axvline(1, color="black", linewidth=1)
        plain = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axis.bar_label(found, fmt="%.2f", padding=4, bbox=plain)
        axis.set(title=f"out = in = {width}")
        axis.margins(x=0.22)
    axes[0].invert_yaxis()
    tokens = max(point[0] for lines in ratios.values() for points in lines.values() for point in points)
    label = f"peak memory of a training step of {tokens} tokens, as a ratio to a trained nn.Linear's (weights left out)"
    figure.supxlabel(label, fontsize="medium")
    save_figure(figure, path)


def _panels(count: int, *, height: float) -> tuple[Any, Sequence[Any]]:
    needs("matplotlib").use("Agg")
    pyplot = needs("matplotlib.pyplot")
    figure, axes = pyplot.subplots(
        1, count, figsize=(9, height), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    return figure, axes[0]


def save_figure(figure: Any, path: Path) -> None:
    """Write the figure, let it go, and say where."""
    figure.savefig(path, dpi=150)
    needs("matplotlib.pyplot").close(figure)
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Draw the plots from layer.csv.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of layer.csv and the plots")
    plot(parser.parse_args().out)
