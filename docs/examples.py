"""Griffe reads doctests below `Examples:` alone; glora's docstrings have `Example:`."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension


class Examples(Extension):
    """Renames the section in each docstring."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """One module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
