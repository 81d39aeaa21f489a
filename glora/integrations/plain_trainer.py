"""A plain Trainer of an adapted model saves the adapter: it is given `AdapterCheckpoints`."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Generator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

from torch import nn

from glora.model.adapters import adapters
from glora.model.change import Engine, engines
from glora.model.huggingface import GUARDED

# Note [Plain Trainers]
# A Trainer calls the model's `save_pretrained` for each checkpoint, which is refused while adapters are attached
# (Note [Exports]): training would end at the first one. To resume, it reads a whole model's file, or PEFT's. Neither is
# asked of anything that belongs to the model. So the first change of a model, where transformers is imported, wraps
# `transformers.Trainer.__init__`: where the model has adapters, the Trainer's class becomes a subclass of its own with
# the mixin in front, as if the user had written it. All else is left alone: models without a `save_pretrained`, whose
# state dicts the Trainer writes and reads itself, Trainers with a `_save` of the user's, FSDP and DeepSpeed.
#
# transformers imports its Trainer when it is first asked for, which may be later, and takes seconds: a finder on
# `sys.meta_path` then waits for that import.
#
# A Trainer takes a model that transformers has quantised only with PEFT's adapters, by a flag of the model that
# `save_pretrained` and others read too. It is set while the Trainer is made.
_MODULE = "transformers.trainer"
_PEFT_FLAG = "_hf_peft_config_loaded"
_LIBRARIES = {"transformers", "trl", "sentence_transformers"}
"""Those whose `_save` calls the model's `save_pretrained`, and writes what the mixin's writes beside it."""


class _Finder(MetaPathFinder):
    """Finds the Trainer's module as others do, once, and has its class wrapped when it has been imported."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:  # noqa: ARG002
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader = cast("Loader", cast("ModuleSpec", spec).loader)
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _wrap(cast("Any", module).Trainer)

        loader.exec_module = exec_module  # of this import's loader alone
        return spec


_watching = False


def _watch(_: nn.Module) -> None:
    """Have Trainers look at their models, from the first change of a model on where there is transformers."""
    global _watching
    if _watching or "transformers" not in sys.modules:
        return
    _watching = True
    if _MODULE in sys.modules:
        _wrap(cast("Any", sys.modules[_MODULE]).Trainer)
    else:
        sys.meta_path.insert(0, _Finder())


def _wrap(trainer_class: Any) -> None:
    init = trainer_class.__init__

    @functools.wraps(init)
    def __init__(self: Any, model: Any = None, *args: Any, **kwargs: Any) -> None:
        with _accepted(model):
            init(self, model, *args, **kwargs)
        _adopt(self)

    trainer_class.__init__ = __init__


@contextmanager
def _accepted(model: Any) -> Generator[None]:
    """Let a Trainer take a quantised model that has adapters (Note [Plain Trainers])."""
    quantised = getattr(model, "is_quantized", False) and not getattr(model, _PEFT_FLAG, False) and adapters(model)
    if quantised:
        setattr(model, _PEFT_FLAG, True)
    try:
        yield
    finally:
        if quantised:
            delattr(model, _PEFT_FLAG)


def _adopt(trainer: Any) -> None:
    from glora.integrations.trainer import AdapterCheckpoints, Unasked

    kind, model = cast("Any", type(trainer)), trainer.model
    if (
        hasattr(model, GUARDED)
        and adapters(model)
        and not isinstance(trainer, AdapterCheckpoints)
        and kind._save.__module__.partition(".")[0] in _LIBRARIES
        and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    ):
        named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        trainer.__class__ = type(kind.__name__, (Unasked, kind), named)


def _nothing(*_: object) -> None:
    """The Trainer needs nothing here."""


engines.append(Engine(_nothing, _nothing, _watch))
