"""How much of a test is run: by the plain command a part, by `.ci/run` all."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

PINNED = 60  # examples of a property in CI (tests/conftest.py)


def long(*values: Any) -> Any:
    """A set of parameters marked `long`: more of a grid whose other entries the plain command runs."""
    return pytest.param(*values, marks=pytest.mark.long)


def examples(count: int) -> settings:
    """Decorates a property that CI draws `count` examples of; other profiles draw more or fewer in proportion."""
    return settings(max_examples=max(5, count * settings.default.max_examples // PINNED))
