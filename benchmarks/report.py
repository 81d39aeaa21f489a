"""What the benchmarks print and write: machine facts, tables, JSON, plots."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import glora
from benchmarks.peers import needs

RESULTS = Path(__file__).parent / "results"


def common_options(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks share."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0 (default: cpu)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads on the CPU (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and plots")
    parser.add_argument("--quick", action="store_true", help="a small grid, in under three minutes")


def start(device: str, threads: int) -> None:
    """Set the threads, and fail now rather than at the end where the tables' and plots' packages are missing."""
    needs("rich")
    needs("matplotlib")
    torch.set_num_threads(threads)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {device}: torch finds no CUDA device here.")


def facts(device: str) -> dict[str, Any]:
    """What a reader must know of the machine to read the times; nothing that tells whose it is."""
    packages = ("peft", "lycoris-lora", "transformers")
    on_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else _cpu(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_cuda else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"glora": glora.__version__} | {package: _version(package) for package in packages},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column to the left, the others to the right."""
    console, module = needs("rich.console").Console(), needs("rich.table")
    made = module.Table(title=title, title_justify="left")
    for column, name in enumerate(header):
        made.add_column(name, justify="left" if column == 0 else "right")
    for row in rows:
        made.add_row(*row)
    if not console.is_terminal:  # a pipe has no width of its own, and 80 columns cut the numbers
        console.width = 160
    console.print(made)


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Write results, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"wrote {path.name}")


def seconds(value: float) -> str:
    """
    Example:
        >>> seconds(0.00123), seconds(1.5), seconds(4.2e-05)
        ('1.23 ms', '1.50 s', '42.0 us')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value / size >= 10 else f"{value / size:.2f} {unit}"
    return f"{value / 1e-6:.1f} us"


def mebibytes(value: float) -> str:
    """
    Example:
        >>> mebibytes(3 * 2**20)
        '3.0 MiB'
    """
    return f"{value / 2**20:.1f} MiB"


@dataclass(frozen=True)
class Panel:
    """One coordinate system: a title, and name to points (x, y)."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def plot(path: Path, panels: Sequence[Panel], *, x: str, y: str) -> None:
    """Lines over logarithmic axes, one panel beside the other; glora's lines solid, the others' dashed."""
    matplotlib = needs("matplotlib")
    matplotlib.use("Agg")
    pyplot = needs("matplotlib.pyplot")
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colors = {name: pyplot.get_cmap("tab20")(number % 20) for number, name in enumerate(names)}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels) + 2.5, 4.5), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for name, points in panel.lines.items():
            ours = name.startswith("glora")
            style: dict[str, Any] = {"color": colors[name], "marker": "o", "markersize": 3, "label": name}
            axis.plot(*zip(*sorted(points), strict=True), ls="-" if ours else "--", lw=2 if ours else 1, **style)
        axis.set(xscale="log", yscale="log", xlabel=x, title=panel.title)
        axis.xaxis.set_major_locator(_at_the_points(panel))
        axis.xaxis.set_major_formatter(needs("matplotlib.ticker").FormatStrFormatter("%d"))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(y)
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    print(f"wrote {path.name}")


def bars(path: Path, groups: Mapping[str, Mapping[str, float]]) -> None:
    """One panel of horizontal bars for each group: title (with its unit) to name to value."""
    needs("matplotlib").use("Agg")
    pyplot = needs("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, len(groups), figsize=(6 * len(groups), 3.5), squeeze=False, sharey=True)
    for axis, (title, values) in zip(axes[0], groups.items(), strict=True):
        colors = ["tab:blue" if name.startswith("glora") else "silver" for name in values]
        axis.bar_label(axis.barh(list(values), list(values.values()), color=colors), fmt="%.3g", padding=2)
        axis.set_title(title)
        axis.margins(x=0.15)
    axes[0][0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    print(f"wrote {path.name}")


def _at_the_points(panel: Panel) -> Any:
    values = sorted({point[0] for points in panel.lines.values() for point in points})
    return needs("matplotlib.ticker").FixedLocator(values)


@dataclass(frozen=True)
class Goal:
    """A ratio that was measured, and what it must not exceed, or equal.

    Attributes:
        what: what was measured.
        ratio: the median.
        bound: what it must not exceed.
        quartiles: of the ratio; None where it was measured once.
        equal: it must be the bound itself: the bound lies between the quartiles.
    """

    what: str
    ratio: float
    bound: float
    quartiles: tuple[float, float] | None = None
    equal: bool = False

    @property
    def met(self) -> bool:
        if self.equal and self.quartiles is not None:
            return self.quartiles[0] <= self.bound <= self.quartiles[1]
        return self.ratio <= self.bound


def print_goals(title: str, goals: Sequence[Goal]) -> None:
    """Print each goal with its ratio."""
    rows = [
        [
            goal.what,
            f"{goal.ratio:.3f}",
            "{:.3f} - {:.3f}".format(*goal.quartiles) if goal.quartiles else "",
            f"{'=' if goal.equal else '<='} {goal.bound:.2f}",
            "met" if goal.met else "MISSED",
        ]
        for goal in goals
    ]
    table(title, ["ratio", "median", "quartiles", "goal", ""], rows)
