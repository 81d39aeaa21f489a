"""Adapters off one tensor, which stays as it is computed, or is the frozen one again."""

from __future__ import annotations

import weakref
from typing import cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from glora.layer.adapted import read
from glora.layer.parametrization import Bias, adapters_of, live_stacks
from glora.sharding import is_sharded

_plain_classes: weakref.WeakValueDictionary[type[nn.Module], type[nn.Module]] = weakref.WeakValueDictionary()


def unregister(module: nn.Module, name: str, *, keep_value: bool) -> None:
    """Take the adapters off a tensor: its computed value stays (`keep_value`), or the original, by torch's own call."""
    store, original, kind = adapters_of(module)[name], live_stacks(module)[name].original, type(module)
    written = keep_value and is_sharded(original)
    if written:  # torch's removal exchanges the memory, which fully_shard goes on using
        with torch.no_grad():
            original.copy_(read(module, name))
    parametrize.remove_parametrizations(module, name, leave_parametrized=keep_value and not written)
    if isinstance(store, Bias) and store.created and not keep_value:
        module.register_parameter(name, None)
    if type(module) is not kind and "_glora_adapted" not in vars(kind):
        module.__class__ = _on_base_class(kind)


def _on_base_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that somebody (fully_shard) has put on top of one of ours, on top of its base class instead."""
    found = _plain_classes.get(kind)
    if found is None:
        bases = tuple([base.__bases__[0] if "_glora_adapted" in vars(base) else base for base in kind.__bases__])
        attributes = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
        made = type(bases[-1])(kind.__name__.replace("Parametrized", ""), bases, attributes)
        found = _plain_classes[kind] = cast("type[nn.Module]", made)
    return found
