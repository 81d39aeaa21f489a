"""A file that remembers runs, a line each: what it holds is not run again."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

RESULTS = Path(__file__).parent / "results"

RunType = TypeVar("RunType")


class Store(Generic[RunType]):
    """The runs of a study.

    Args:
        path: a CSV file; made where it is absent.
        kind: the dataclass of a run; its fields are of the types str, int and float.
        about: the machine and versions, for the first line.

    Example:
        >>> import tempfile
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Run:
        ...     method: str
        ...     loss: float
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Store(Path(folder) / "runs.csv", Run, "a machine").add(Run("LoRA", 0.5))
        ...     Store(Path(folder) / "runs.csv", Run, "another").read()
        [Run(method='LoRA', loss=0.5)]
    """

    def __init__(self, path: Path, kind: type[RunType], about: str) -> None:
        self.path, self._kind = path, kind
        self._names = [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# {about}\n{_line(self._names)}")
        elif not (held := path.read_text()).endswith("\n"):
            path.write_text(held[: held.rfind("\n") + 1])  # a line that was cut off while it was written

    def add(self, run: RunType) -> None:
        """One line more: one write at the end, so that two processes may share the file."""
        values: dict[str, Any] = asdict(run)  # pyright: ignore[reportArgumentType, reportCallIssue]
        with self.path.open("a") as file:
            file.write(_line([f"{value:.6g}" if isinstance(value, float) else value for value in values.values()]))

    def read(self) -> list[RunType]:
        """All runs, in the order in which they were made."""
        types: dict[str, str] = {field.name: str(field.type) for field in fields(self._kind)}  # pyright: ignore
        convert = {"str": str, "int": int, "float": float}
        rows = csv.DictReader(self.path.read_text().splitlines()[1:])
        return [self._kind(**{name: convert[types[name]](row[name]) for name in self._names}) for row in rows]


def _line(cells: Sequence[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
