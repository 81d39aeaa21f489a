"""How glora writes lists, problems and tables into its messages."""

from __future__ import annotations

import html
import itertools
import shutil
import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias


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


def brief(found: object) -> str:
    """What was found in place of something else: as Python writes it, or its kind where that is long.

    Example:
        >>> brief(8), brief("x" * 100)
        ('8', 'a str')
    """
    written = repr(found)
    return written if len(written) <= 60 else f"a {type(found).__name__}"


def choice(known: Collection[str]) -> str:
    """What to do about a name that is unknown or missing."""
    if known:
        return "Pass one of them."
    return "Attach one first, with glora.apply or glora.load; after glora.merge or glora.remove there is none."


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


# Note [Tables]
# A table is as wide as its cells if that fits into the terminal, or into 80 columns where there is none. Else it gives
# way in this order: "A=lora B=lora" becomes "A,B=lora"; sentences break into lines; the paths of the first column keep
# only the first letters of their names, from the left, and all numbers (`encoder.layer.11.query`: `e.l.11.query`),
# unless two would become the same; other cells break at spaces, the widest first. Nothing else is cut.
_COLUMNS = 80
_SENTENCE = 36  # columns of a sentence that breaks
_GAP = "  "
Rows: TypeAlias = Sequence[Sequence[str | int | None]]


@dataclass(frozen=True)
class Table:
    """A title, columns, and a line below them; printed in columns, in a notebook as HTML. None is a dash.

    Attributes:
        title: the line above.
        header: the columns' names; the first column is one of paths, the last one stands to the right.
        rows: the cells. A number has commas, None is a dash.
        note: the line below; none where it is empty.
    """

    title: str
    header: Sequence[str]
    rows: Rows
    note: str = ""

    def __str__(self) -> str:
        lines = [list(self.header), *([_cell(cell) for cell in row] for row in self.rows)]
        most = max(_COLUMNS, shutil.get_terminal_size().columns)
        shown, notes = lines if _width(lines) <= most else _narrowed(lines, most), [self.note]
        if any(path and path not in {row[0] for row in lines} for path, *_ in shown):
            notes += ["The first names of paths are cut to their first letters; a wider terminal shows them whole."]
        wrapped = [line for note in notes for line in textwrap.wrap(note, most, break_long_words=False)]
        return "\n".join([self.title, *_aligned(shown), *wrapped])

    def _repr_html_(self) -> str:
        def row(cells: Iterable[str], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

        body = "".join(row(map(_cell, cells), "td") for cells in self.rows)
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        head = f"<caption>{html.escape(self.title)}</caption><thead>{row(self.header, 'th')}</thead>"
        return f"<table>{head}<tbody>{body}</tbody></table>{note}"


def table(title: str, header: Sequence[str], rows: Rows) -> str:
    """A title and aligned columns; the last one to the right (Note [Tables]). A number has commas, None is a dash.

    Example:
        >>> print(table("two", ["a", "n"], [["x", 1], ["yy", 10]]))
        two
        a    n
        x    1
        yy  10
    """
    return str(Table(title, header, rows))


def _cell(cell: str | int | None) -> str:
    return "-" if cell is None else cell if isinstance(cell, str) else f"{cell:,}"


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def _width(lines: Sequence[Sequence[str]]) -> int:
    return sum(_widths(lines)) + len(_GAP) * (len(lines[0]) - 1)


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = _widths(lines)
    pad = [*[str.ljust] * (len(widths) - 1), str.rjust]
    return [
        _GAP.join(p(cell, width) for p, cell, width in zip(pad, line, widths, strict=True)).rstrip() for line in lines
    ]


def _narrowed(lines: list[list[str]], most: int) -> list[list[str]]:
    """The cells in fewer columns; one line may become several (Note [Tables])."""
    lines = [[line[0], *map(_grouped, line[1:])] for line in lines]
    widths = _widths(lines)
    words = [max(len(word) for cell in column for word in cell.split(" ")) for column in zip(*lines, strict=True)]
    widths[1:] = [min(width, max(word, _SENTENCE)) for width, word in zip(widths[1:], words[1:], strict=True)]
    most -= len(_GAP) * (len(widths) - 1)
    paths = _abbreviated([line[0] for line in lines], most - sum(widths[1:]))
    lines = [[path, *line[1:]] for path, line in zip(paths, lines, strict=True)]
    widths[0] = words[0] = max(map(len, paths))
    while sum(widths) > most and widths != words:
        column = max(range(len(widths)), key=lambda column: (widths[column] > words[column], widths[column]))
        widths[column] -= 1
    broken: list[list[str]] = []
    for line in lines:
        parts = [_broken(cell, width) for cell, width in zip(line, widths, strict=True)]
        broken += [list(cells) for cells in itertools.zip_longest(*parts, fillvalue="")]
    return broken


def _broken(cell: str, width: int) -> list[str]:
    return textwrap.wrap(cell, width, break_long_words=False, break_on_hyphens=False) or [cell]


def _grouped(cell: str) -> str:
    """`A,B=lora C=vector` for `A=lora B=lora C=vector`; what is no list of such pairs stays."""
    names: dict[str, list[str]] = {}
    for pair in cell.split(" "):
        name, equals, value = pair.partition("=")
        if not (name.isidentifier() and equals and value):
            return cell
        names.setdefault(value, []).append(name)
    return " ".join(f"{','.join(of)}={value}" for value, of in names.items())


def _abbreviated(paths: Sequence[str], room: int) -> list[str]:
    """Dotted paths, of as many names from the left the first letters alone as all need to fit.

    A path stays whole where it would be the same as another one's.
    """
    split = [path.split(".") for path in paths]
    short = list(paths)
    for most in range(1, max(map(len, split))):
        if max(map(len, short)) <= room:
            break
        short = [".".join([*map(_initial, names[:-1][:most]), *names[:-1][most:], names[-1]]) for names in split]
    owners = dict(zip(short, paths, strict=True))
    clashes = {new for new, path in zip(short, paths, strict=True) if owners[new] != path}
    return [path if new in clashes else new for new, path in zip(short, paths, strict=True)]


def _initial(name: str) -> str:
    return name if name.isdecimal() else name[:1]
