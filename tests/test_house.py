"""The project's own bounds: how much code there is, how deep it goes, and through how much of it a call passes."""

from __future__ import annotations

import ast
import gc
import io
import re
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import glora
from tests.helpers.calls import LORA

# What was measured, on Python 3.11; less is always allowed. `python -m tests.test_house` prints what is now. To raise a
# bound is a commit of its own, whose message says why.
CODE_LINES = {  # no docstrings, comments or blank lines
    "all": 10298,
    "ground": 1245,
    "kernels": 606,
    "layer": 1420,
    "model": 2322,
    "engines": 194,
    "files": 781,
    "arithmetic": 492,
    "interop": 2392,
    "integrations": 346,
    "search": 500,
}
FILES = {
    "all": 110,
    "ground": 13,
    "kernels": 8,
    "layer": 17,
    "model": 20,
    "engines": 4,
    "files": 6,
    "arithmetic": 5,
    "interop": 22,
    "integrations": 6,
    "search": 9,
}
IMPORT_CHAIN = 14  # rooms of which each imports the next
CALLS = {  # files that a call passes through, how often it goes from one to another, functions called
    "layer(x)": (15, 47, 73),
    "layer(x) of a LoRA": (8, 7, 10),
    "apply": (28, 255, 586),
    "load": (31, 310, 884),
    "route": (21, 365, 631),
    "merge": (26, 354, 644),
}

ROOT = Path(glora.__file__).parent
CONTRIBUTING = ROOT.parent / "CONTRIBUTING.md"


def within(what: str, measured: int | tuple[int, ...], allowed: int | tuple[int, ...]) -> None:
    pairs = zip(*(value if isinstance(value, tuple) else (value,) for value in (measured, allowed)), strict=True)
    assert all(found <= most for found, most in pairs), (
        f"{what}: measured {measured}, allowed {allowed}. Make it less. To raise a bound of tests/test_house.py is a "
        f"commit of its own, whose message says why it is worth it."
    )


@cache
def rooms() -> dict[str, Path]:
    """Each module of the library by its name."""
    names = {file: ".".join(file.relative_to(ROOT.parent).with_suffix("").parts) for file in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): file for file, name in sorted(names.items())}


def wing(name: str) -> str:
    """The folder of a room; rooms outside of any, `glora/__init__` among them, are the ground."""
    folder, *inside = rooms()[name].relative_to(ROOT).parts
    return folder if inside else "ground"


def by_wing(sizes: dict[str, int]) -> dict[str, int]:
    counted = Counter({"all": sum(sizes.values())})
    for name, size in sizes.items():
        counted[wing(name)] += size
    return dict(counted)


def code_lines(source: str) -> int:
    """Lines that hold code.

    >>> code_lines('"A docstring."\\n\\n# A comment.\\nx = (1,  # another\\n     2)\\n')
    2
    """
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in blank:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def imported(name: str) -> set[str]:
    """The rooms that a room imports when it is imported itself, rather than inside of its functions."""
    found: set[str] = set()
    for node in _at_import(ast.parse(rooms()[name].read_text()).body):
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & rooms().keys() or {node.module} & rooms().keys()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & rooms().keys()
    return found - {name}


def _at_import(statements: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in statements:
        yield statement
        if isinstance(statement, ast.Try) or (
            isinstance(statement, ast.If) and "TYPE_CHECKING" not in ast.dump(statement.test)
        ):
            yield from _at_import(statement.body)


@cache
def chain(name: str) -> list[str]:
    """The deepest chain of imports below a room, itself first; lint-imports sees to it that there is no cycle."""
    return [name, *max(map(chain, sorted(imported(name))), key=len, default=[])]


def passage(call: Callable[[], object]) -> tuple[int, int, int]:
    """How many files of the library a call passes through, how often it goes from one to another, and its calls."""
    files: list[str] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(f"{ROOT}/"):
            files.append(file)

    gc.collect()  # what other tests left, which would be looked through
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return len(set(files)), sum(a != b for a, b in pairwise(files)), len(files)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


def call_of(name: str, folder: Path) -> Callable[[], object]:
    """One of `CALLS`, on a model of its own."""
    x = torch.randn(3, 8)
    if name == "apply":
        plain = model()
        return lambda: glora.apply(plain, config=glora.GLoRAConfig.glora())
    if name == "load":
        saved = glora.apply(model(), config=glora.GLoRAConfig.glora())
        glora.save(saved, folder)
        plain = model()
        plain.load_state_dict(glora.base_state_dict(saved))
        return lambda: glora.load(plain, folder)
    if name == "route":
        several = glora.apply(
            glora.apply(model(), name="a", config=glora.GLoRAConfig.glora()), name="b", config=glora.GLoRAConfig.glora()
        )

        def route() -> None:
            with glora.route(several, ["a", None, "b"]):
                several(x)

        return route
    adapted = glora.apply(model(), config=LORA if name.endswith("LoRA") else glora.GLoRAConfig.glora())
    return (lambda: glora.merge(adapted)) if name == "merge" else (lambda: adapted[0](x))


def measured(name: str, folder: Path) -> tuple[int, int, int]:
    """What a call passes through the second time: the first imports, and fills caches."""
    first = call_of(name, folder)
    held = glora.apply(model(), config=glora.GLoRAConfig.glora())  # the registry of adapted classes is weak
    first()
    found = passage(call_of(name, folder))
    del first, held
    return found


def measured_lines() -> dict[str, int]:
    return by_wing({name: code_lines(file.read_text()) for name, file in rooms().items()})


def measured_files() -> dict[str, int]:
    return by_wing(dict.fromkeys(rooms(), 1))


def deepest_chain() -> list[str]:
    return max(map(chain, rooms()), key=len)


@pytest.mark.parametrize("name", CODE_LINES)
def test_lines_of_code(name: str) -> None:
    within(f"lines of code, {name}", measured_lines()[name], CODE_LINES[name])


@pytest.mark.parametrize("name", FILES)
def test_files(name: str) -> None:
    within(f"files, {name}", measured_files()[name], FILES[name])


def test_every_wing_has_its_bounds() -> None:
    assert measured_files().keys() == CODE_LINES.keys() == FILES.keys()


def test_the_deepest_chain_of_imports() -> None:
    deepest = deepest_chain()
    within(f"rooms in a chain of imports ({' > '.join(deepest)})", len(deepest), IMPORT_CHAIN)


@pytest.mark.parametrize("name", CALLS)
def test_what_a_call_passes_through(name: str, tmp_path: Path) -> None:
    within(f"files, changes of file and calls of {name}", measured(name, tmp_path), CALLS[name])


def mapped() -> Iterator[str]:
    """The rooms in CONTRIBUTING's map: a line `room   what it is` below the line of its folder, `folder/`."""
    drawn = CONTRIBUTING.read_text().split("```")[1]
    folders: list[tuple[int, str]] = []
    for indent, name, slash in re.findall(r"^( *)(\w+)(/?)  +\S", drawn, re.MULTILINE):
        folders = [(depth, folder) for depth, folder in folders if depth < len(indent)]
        if slash:
            folders.append((len(indent), name))
        else:
            yield ".".join(["glora", *(folder for _, folder in folders), name])


def test_the_map_in_contributing_has_every_room() -> None:
    listed, there = set(mapped()), {name for name, file in rooms().items() if file.name != "__init__.py"}
    assert listed == there, (
        f"CONTRIBUTING's map must have a line for each room. Without a line: {sorted(there - listed)}. No room: "
        f"{sorted(listed - there)}."
    )


if __name__ == "__main__":
    print(f"CODE_LINES = {measured_lines()}\nFILES = {measured_files()}\nIMPORT_CHAIN = {len(deepest_chain())}")
    with tempfile.TemporaryDirectory() as folder:
        print(f"CALLS = { {name: measured(name, Path(folder)) for name in CALLS} }")
