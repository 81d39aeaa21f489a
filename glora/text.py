"""How glora writes lists, problems and tables into its messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def format_names(names: Iterable[str], most: int = 6) -> str:
    """The first few names, and how many more there are; an empty path is the model itself.

    Example:
        >>> format_names(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    return shorten([name or "the model itself" for name in names], most, ", ", " and ")


def quote_names(names: Iterable[str]) -> str:
    """All names in quotes, or "none"."""
    return ", ".join(map(repr, names)) or "none"


class UnknownName(KeyError):
    """A KeyError that shows its message as it is; Python's own shows the repr of it."""

    def __str__(self) -> str:
        return str(self.args[0])


def format_problems(problems: Sequence[str], most: int = 5) -> str:
    """The first few problems, and how many more there are."""
    return shorten(problems, most, "; ", "; and ")


def shorten(items: Sequence[str], most: int, separator: str, last: str) -> str:
    """The first `most` items; behind `last`, how many more there are."""
    more = len(items) - most
    return separator.join(items[:most]) + (f"{last}{more} more" if more > 0 else "")


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str | int | None]]) -> str:
    """A title and aligned columns; the last one to the right. A number has commas, None is a dash.

    Example:
        >>> print(table("two", ["a", "n"], [["x", 1], ["yy", 10]]))
        two
        a    n
        x    1
        yy  10
    """
    lines = [header, *[["-" if c is None else c if isinstance(c, str) else f"{c:,}" for c in row] for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "  ".join(
            cell.rjust(width) if column == len(header) - 1 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([title, *text])
