"""The fingerprints of an adapter's base in files: of glora's own, and as metadata of other libraries' files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glora.files.container import parse_json, read_header
from glora.fingerprint import Fingerprint
from glora.spec import AdapterFileError

_KEY = "glora_base"


def parse_base(raw: Any) -> dict[str, Fingerprint]:
    """Key to fingerprint, from what JSON says.

    Raises:
        TypeError, ValueError, AttributeError, OverflowError: it says something else.
    """
    found = {str(key): tuple([float(number) for number in known]) for key, known in raw.items()}
    if not all(len(known) and all(map(math.isfinite, known)) for known in found.values()):
        raise ValueError("fingerprints that are empty or not finite")
    return found


def base_metadata(base: Mapping[str, Fingerprint]) -> dict[str, str]:
    """Metadata of a safetensors file that say which base its adapter was trained beside; other readers pass them by."""
    return {_KEY: json.dumps(base)} if base else {}


def read_base(file: Path) -> dict[str, Fingerprint]:
    """What `base_metadata` wrote into a safetensors file; nothing where others wrote it.

    Raises:
        AdapterFileError: it is damaged.
    """
    metadata: dict[str, str] = read_header(file)[0].get("__metadata__") or {}
    text = metadata.get(_KEY)
    try:
        return parse_base({} if text is None else parse_json(text, file))
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise AdapterFileError(f"The fingerprints in {file} cannot be understood: {error!r}.") from error
