"""Regexes in other libraries' configs, matched only where that cannot take long."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, cast

# Note [Hostile regexes]
# Python's `re` tries one way after the other to match, and `(a+)+b` has 2^n of them on n letters: a config of a few
# bytes would hold the process for ever. The ways that a pattern can be tried on a path are bounded from its parts:
# those of a sequence multiply, those of alternatives add up, `.*` has as many as the path has letters, and what is
# repeated, and has several ways itself, has them to the power of the repetitions. A pattern with too many is refused
# by name; three `.*` in one path are within the bound.
_MOST = 10**6


def matches(pattern: str, path: str, *, end: bool = False) -> bool:
    r"""Whether a regex matches a path as a whole; with `end`, the path or what follows one of its dots, as PEFT has it.

    Raises:
        ValueError: the regex may take too long (Note [Hostile regexes]).

    Example:
        >>> matches(r"layers\.\d+\.(q|k)_proj", "model.layers.3.q_proj", end=True)
        True
    """
    if _ways_on(pattern, len(path)) > _MOST:
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
def _ways_on(pattern: str, length: int) -> float:
    return _ways(_parse(pattern), length)


def _ways(parts: Iterable[tuple[Any, Any]], length: int) -> float:
    """A bound of the ways in which parts in sequence can be tried on so many letters."""
    return min(math.prod([_ways_of(str(kind), of, length) for kind, of in parts], start=1.0), 1e9)


def _ways_of(kind: str, of: Any, length: int) -> float:
    """The ways of one part."""
    if kind.endswith("REPEAT"):
        least, most, body = of
        ways, times = _ways(body, length), min(int(most), max(int(least), length))
        if ways > 1 and times > 20:
            return 1e9
        return 1.0 + times if ways == 1 else sum(ways**n for n in range(times + 1))
    if kind == "BRANCH":
        return sum(_ways(body, length) for body in of[1])
    bodies = cast("tuple[Any, ...]", of if isinstance(of, tuple) else (of,))
    parsed: Any = type(_parse(""))
    return math.prod([_ways(body, length) for body in bodies if isinstance(body, parsed)])
