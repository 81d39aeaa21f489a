"""Regexes in other libraries' configs, matched only where that cannot take long."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, cast

# Note [Hostile regexes]
# Python's `re` tries one way after the other to match, and `(a+)+b` has 2^n of them on n letters: a config of a few
# bytes would hold the process for ever. The ways that a pattern can be tried on a path are bounded from its parts:
# those of a sequence multiply, those of alternatives add up, `.*` has as many as the path has letters, and what is
# repeated, and has several ways itself, has them to the power of the repetitions. A pattern with too many is refused
# by name; three `.*` in one path are within the bound.
#
# Where the next letter tells, there is one way: `\w+` before a dot ends at the dot, since no shorter one goes on, and
# of alternatives that begin with different letters one can match. So `(\w+\.)*q_proj` has as many ways as `\w*`. What a
# part may begin with is a set of bits, one for each letter of ASCII; with other letters in the path, or flags in the
# pattern, no letter tells.
_MOST = 10**6
_END, _EMPTY = 1 << 128, 1 << 129  # the end of the path; that a part may match no letter at all
_ALL = 2 * _EMPTY - 1
_FLAGS = re.compile(r"\(\?[a-zA-Z-]")


def matches(pattern: str, path: str, *, end: bool = False) -> bool:
    r"""Whether a regex matches a path as a whole; with `end`, the path or what follows one of its dots, as PEFT has it.

    Raises:
        ValueError: the regex may take too long (Note [Hostile regexes]).

    Example:
        >>> matches(r"layers\.\d+\.(q|k)_proj", "model.layers.3.q_proj", end=True)
        True
    """
    if _ways_on(pattern, len(path), path.isascii() and not _FLAGS.search(pattern)) > _MOST:
        raise ValueError(
            f"the regex {pattern!r:.100} can be tried in more than {_MOST:,} ways on {path!r:.100}, as those with "
            f"nested or many quantifiers can: write it without"
        )
    return (_compiled(rf"(.*\.)?({pattern})$").match(path) if end else _compiled(pattern).fullmatch(path)) is not None


def of_pattern(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """A layer's entry in PEFT's rank_pattern or alpha_pattern: that of the first regex that its path ends in."""
    return next((value for key, value in (pattern or {}).items() if matches(key, path, end=True)), default)


_compiled = lru_cache(10_000)(re.compile)  # as many as a config has; those that `re` itself keeps are fewer


@lru_cache(10_000)
def _parse(pattern: str) -> Iterable[tuple[Any, Any]]:
    """The parts of a regex, as `re` itself takes it apart: kind and arguments."""
    parser: Any = importlib.import_module("sre_parse" if sys.version_info < (3, 11) else "re._parser")
    return parser.parse(pattern)


@lru_cache(100_000)
def _ways_on(pattern: str, length: int, letters_tell: bool) -> float:
    return _Tried(length, letters_tell).ways(_parse(pattern), _END | 1 << ord("\n"))


class _Tried:
    """A bound of the ways in which parts of a regex can be tried on so many letters (Note [Hostile regexes])."""

    def __init__(self, length: int, letters_tell: bool) -> None:
        self.length, self.letters_tell = length, letters_tell

    def ways(self, parts: Iterable[tuple[Any, Any]], follow: int) -> float:
        """The ways of parts in sequence, before something that begins with one of the letters `follow`."""
        total = 1.0
        for kind, of in reversed(list(parts)):
            total *= self._ways_of(str(kind), of, follow)
            follow = self._first_of(str(kind), of, follow)
        return min(total, 1e9)

    def _ways_of(self, kind: str, of: Any, follow: int) -> float:
        if kind.endswith("REPEAT"):
            least, most, body = of
            times = min(int(most), max(int(least), self.length))
            ways = self.ways(body, self._first(body, follow) | follow)
            if ways > 1:
                return 1e9 if times > 20 else sum(ways**n for n in range(times + 1))
            return 1.0 + times if self._first(body, _EMPTY) & (follow | _EMPTY) else 1.0
        if kind == "BRANCH":
            ways, begun, overlap = [self.ways(body, follow) for body in of[1]], 0, 0
            for first in [self._first(body, follow) for body in of[1]]:
                overlap |= begun & first
                begun |= first
            return sum(ways) if overlap else max(ways)
        bodies = cast("tuple[Any, ...]", of if isinstance(of, tuple) else (of,))
        parsed: Any = type(_parse(""))
        after = follow if kind in ("SUBPATTERN", "ATOMIC_GROUP") else _ALL
        return math.prod([self.ways(body, after) for body in bodies if isinstance(body, parsed)])

    def _first(self, parts: Iterable[tuple[Any, Any]], follow: int) -> int:
        """The letters that parts in sequence may begin with; `follow` where they may match none."""
        for kind, of in reversed(list(parts)):
            follow = self._first_of(str(kind), of, follow)
        return follow

    def _first_of(self, kind: str, of: Any, follow: int) -> int:
        if not self.letters_tell:
            return _ALL
        if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return _letters(kind, of)
        if kind.endswith("REPEAT"):
            return self._first(of[2], follow) | (0 if of[0] else follow)
        if kind == "BRANCH":
            begun = 0
            for body in of[1]:
                begun |= self._first(body, follow)
            return begun
        if kind in ("SUBPATTERN", "ATOMIC_GROUP"):
            return self._first(cast("tuple[Any, ...]", of)[-1] if isinstance(of, tuple) else of, follow)
        if kind == "AT":
            return _END | 1 << ord("\n") if str(of).startswith("AT_END") else follow
        return _ALL


_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "DIGIT": str.isdecimal,
    "SPACE": str.isspace,
    "WORD": lambda letter: letter.isalnum() or letter == "_",
}


def _letters(kind: str, of: Any) -> int:
    """The letters of ASCII that a part of one letter matches."""
    if kind == "ANY":
        return (1 << 128) - 1
    if kind != "IN":
        found = 1 << of if of < 128 else 0
        return found if kind == "LITERAL" else (1 << 128) - 1 - found
    found, negated = 0, False
    for name, value in cast("list[tuple[Any, Any]]", of):
        if str(name) == "NEGATE":
            negated = True
        elif str(name) == "CATEGORY":
            what, holds = str(value).removeprefix("CATEGORY_").removeprefix("UNI_"), True
            what, holds = what.removeprefix("NOT_"), not what.startswith("NOT_")
            found |= sum(1 << code for code in range(128) if _CATEGORIES[what](chr(code)) == holds)
        elif str(name) == "RANGE":
            found |= sum(1 << code for code in range(128) if value[0] <= code <= value[1])
        else:
            found |= _letters(str(name), value)
    return (1 << 128) - 1 - found if negated else found
