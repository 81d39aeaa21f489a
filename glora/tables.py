"""Plain text tables: all that `plan` and `summary` need, without a dependency."""

from __future__ import annotations

from collections.abc import Sequence


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A title and aligned columns; the last one to the right.

    Example:
        >>> print(table("two", ["a", "n"], [["x", "1"], ["yy", "10"]]))
        two
        a    n
        x    1
        yy  10
    """
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "  ".join(
            cell.rjust(width) if column == len(header) - 1 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([title, *text])
