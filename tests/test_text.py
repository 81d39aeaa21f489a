"""Lists, problems and tables in messages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from glora.text import format_names, format_problems, quote_names, table

NAMES = st.lists(st.text("abc.", min_size=1), max_size=9)
CELLS = st.one_of(st.none(), st.integers(-(10**9), 10**9), st.text("xyz", min_size=1, max_size=7))


@given(NAMES, st.integers(1, 5))
def test_the_first_few_are_named_and_the_rest_is_counted(names: list[str], most: int) -> None:
    for text, separator, last in (
        (format_names(names, most), ", ", " and "),
        (format_problems(names, most), "; ", "; and "),
    ):
        first, _, more = text.partition(last)
        assert first == separator.join(names[:most])
        assert more == (f"{len(names) - most} more" if len(names) > most else "")


def test_an_empty_path_is_the_model_itself_and_no_names_are_none() -> None:
    assert format_names(["", "a"]) == "the model itself, a"
    assert quote_names([]) == "none"
    assert quote_names(["a", ""]) == "'a', ''"


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=5))
def test_a_tables_columns_stand_below_one_another(rows: list[tuple[str | int | None, ...]]) -> None:
    title, *lines = table("title", ["one", "two", "three"], rows).splitlines()
    assert title == "title"
    assert len(lines) == len(rows) + 1
    assert len({len(line) for line in lines}) == 1  # the last column ends in one line
    for row, line in zip(rows, lines[1:], strict=True):
        assert line.split() == ["-" if cell is None else f"{cell:,}" if isinstance(cell, int) else cell for cell in row]
        assert line.split()[0] == line[: len(line.split()[0])]
    second = lines[0].index("two")
    assert all(line[second] != " " and line[second - 2 : second] == "  " for line in lines)
