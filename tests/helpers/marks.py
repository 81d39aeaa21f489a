"""Parameters of tests that `.ci/run` tries, and the plain command does not."""

from __future__ import annotations

from typing import Any

import pytest


def long(*values: Any) -> Any:
    """A set of parameters marked `long`: more of a grid whose other entries the plain command runs."""
    return pytest.param(*values, marks=pytest.mark.long)
