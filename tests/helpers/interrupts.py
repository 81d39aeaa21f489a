"""Exceptions that arrive in the midst of a call, and all that such a call must leave as it was."""

from __future__ import annotations

import linecache
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import glora
from tests.helpers.state import contents

LIBRARY = str(Path(glora.__file__).parent)
# These look and decide, before anything changes; files/ opens files besides, which an exception would leave open.
ROOMS = ("model/plan", "model/targets", "model/checks", "config", "spec", "text", "functional", "kernels")
READING = tuple(f"{LIBRARY}/{room}" for room in ROOMS)
FILES = f"{LIBRARY}/files"


@dataclass
class Interrupt:
    """Counts the lines that the library runs, and torch's removal for it; raises before one of them, once.

    Args:
        at: the line to raise before, counted from 1; None: only count.
        error: what is raised.
    """

    at: int | None = None
    error: type[BaseException] = KeyboardInterrupt
    lines: list[tuple[str, int]] = field(default_factory=list)

    @property
    def place(self) -> str:
        """Where it was raised."""
        file, line = self.lines[-1]
        return f"{Path(file).parent.name}/{Path(file).name}:{line} {linecache.getline(file, line).strip()!r}"

    def run(self, call: Callable[[], object]) -> BaseException | None:
        """What the call raised."""
        before, thread = sys.gettrace(), threading.get_ident()

        def on_call(frame: FrameType, event: str, argument: Any) -> Any:  # noqa: ARG001 - the interpreter's signature
            file = frame.f_code.co_filename
            inside = file == parametrize.__file__ or (file.startswith(LIBRARY) and not file.startswith(FILES))
            return on_line if inside and thread == threading.get_ident() else None

        def on_line(frame: FrameType, event: str, argument: Any) -> Any:  # noqa: ARG001
            if event == "line":
                self.lines.append((frame.f_code.co_filename, frame.f_lineno))
                if len(self.lines) == self.at:
                    raise self.error  # the interpreter stops tracing: what cleans up is not cut off
            return on_line

        sys.settrace(on_call)
        try:
            call()
        except BaseException as error:
            return error
        finally:
            sys.settrace(before)
        return None


def everything(model: nn.Module, x: Tensor, held: list[object] | None = None) -> dict[str, Any]:
    """All of a model, down to the entries of its modules' dictionaries.

    Args:
        model: the model.
        x: an input.
        held: takes the objects that were met, and with it their identities count; None: values alone do.
    """

    def frozen(value: object) -> object:
        if isinstance(value, dict):
            # `last_read` remembers for a moment who read the weight; nothing is computed from it.
            return {key: frozen(entry) for key, entry in value.items() if key != "last_read"}
        if isinstance(value, Tensor):
            held_id = None if held is None else id(value)
            return held_id, value.dtype, value.requires_grad, contents(value), type(value)
        if value is None or isinstance(value, (str, int, float, tuple)):
            return value
        return type(value) if held is None else id(value)

    modules = dict(model.named_modules(remove_duplicate=False))
    if held is not None:
        held += [*modules.values(), *(value for module in modules.values() for value in _values(vars(module)))]
    with torch.no_grad():
        return {
            "modules": {path: (type(module), frozen(vars(module))) for path, module in modules.items()},
            "order": [(path, list(vars(module))) for path, module in modules.items()],
            "keys": list(model.state_dict()),
            "adapters": glora.adapters(model),
            "output": contents(model(x)),
        }


def _values(attributes: dict[Any, Any]) -> list[object]:
    return [
        entry for value in attributes.values() for entry in (_values(value) if isinstance(value, dict) else [value])
    ]
