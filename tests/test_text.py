"""Lists, problems and tables in messages."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ElementTree
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glora.text import Table, format_names, format_problems, quote_names, table

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


NAME = st.text("abcxyz_", min_size=1, max_size=12)
PATHS = st.lists(NAME | st.integers(0, 99).map(str), min_size=1, max_size=7).map(".".join)
FORMS = st.lists(st.sampled_from(["lora", "vector", "constant"]), min_size=1, max_size=5).map(
    lambda forms: " ".join(f"{path}={form}" for path, form in zip("ABCDE", forms, strict=False))
)
SENTENCES = st.lists(NAME, min_size=1, max_size=30).map(lambda words: " ".join(["skipped:", *words]))


def ungrouped(cell: str) -> list[str]:
    """`A,B=lora` is `A=lora` and `B=lora`."""
    pairs = [pair.partition("=") for pair in cell.split()]
    return sorted(f"{name}={form}" for names, _, form in pairs for name in names.split(","))


@given(st.dictionaries(PATHS, st.tuples(FORMS | SENTENCES, st.integers(0, 10**12)), min_size=1, max_size=6))
@example({"a.b": ("A=lora", 1)})
@example({f"encoder.layers.{i}.attention.{n}": ("A=lora B=lora C=vector", 9**9) for i in range(2) for n in "qv"})
@example({f"{n}.{'layer' * 9}.query": ("A=lora B=lora C=vector", 9**9) for n in ("encoder", "embedder")})  # the same
def test_a_table_is_of_80_columns_and_keeps_what_it_says(rows: dict[str, tuple[str, int]]) -> None:
    wide = [[path, forms, count] for path, (forms, count) in rows.items()]
    with mock.patch.dict(os.environ, COLUMNS="80"):
        title, header, *lines = table("title", ["module", "forms", "n"], wide).splitlines()
    widest = max(len(path.split(".")[-1]) + 2 * path.count(".") + 24 for path in rows)
    short = {".".join([*(n if n.isdecimal() else n[0] for n in p.split(".")[:-1]), p.split(".")[-1]]) for p in rows}
    if widest < 40 and len(short) == len(rows):
        assert max(map(len, [title, header, *lines])) <= 80
    said = next((i for i, line in enumerate(lines) if line.startswith("The first names of paths are cut")), len(lines))
    notes, lines = lines[said:], lines[:said]
    assert bool(notes) is not all(any(line.startswith(f"{path} ") for line in lines) for path in rows)
    second = header.index("forms")
    texts: list[tuple[str, str]] = []
    for line in lines:  # a line without a path goes on with the one above
        path, rest = line[:second].strip(), line[second:].strip()
        texts = [*texts, (path, rest)] if path else [*texts[:-1], (texts[-1][0], f"{texts[-1][1]} {rest}")]
    assert len({path for path, _ in texts}) == len(rows)
    for (short_path, text), (path, (forms, count)) in zip(texts, rows.items(), strict=True):
        assert re.findall(r"(?<![^.])\d+(?![^.])", short_path) == re.findall(r"(?<![^.])\d+(?![^.])", path)
        assert short_path.split(".")[-1] == path.split(".")[-1]
        assert all(map(str.startswith, path.split("."), short_path.split(".")))
        words = [word for word in text.split() if word != f"{count:,}"]
        assert len(words) == len(text.split()) - 1
        expected = sorted(forms.split()) if forms.startswith("skipped") else ungrouped(forms)
        assert (sorted(words) if forms.startswith("skipped") else ungrouped(" ".join(words))) == expected


def test_a_wide_terminal_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ["a" * 50 + ".b", "A=lora B=lora C=vector D=vector E=vector", 10**12]
    for columns, is_whole in ((20, False), (80, False), (200, True)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert (row[0] in table("", ["module", "forms", "n"], [row])) is is_whole


@given(st.lists(st.tuples(CELLS, st.text("<>&'a", min_size=1), CELLS), max_size=3), st.text("<&n"))
def test_a_notebook_has_the_cells_whole(rows: list[tuple[str | int | None, ...]], note: str) -> None:
    shown = Table("a < b", ["one", "two", "<i>"], rows, note)._repr_html_()
    tree = ElementTree.fromstring(f"<div>{shown}</div>")
    assert [cell.text for cell in tree.iter("th")] == ["one", "two", "<i>"]
    cells = ["-" if cell is None else cell if isinstance(cell, str) else f"{cell:,}" for row in rows for cell in row]
    assert [cell.text for cell in tree.iter("td")] == cells
    assert [caption.text for caption in tree.iter("caption")] == ["a < b"]
    assert [p.text for p in tree.iter("p")] == ([note] if note else [])
