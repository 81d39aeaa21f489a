"""Putting adapters on a tensor of a module, and taking them off."""

from __future__ import annotations

import weakref
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from glora.layer.adapted import adapted_class
from glora.layer.computed import read
from glora.layer.parametrization import Bias, Store, has_adapted_class, live_parametrizations
from glora.layer.recurrent import follow_tensors
from glora.tensors import is_quantised, is_sharded


def register(module: nn.Module, name: str, store: Store) -> None:
    """Put adapters on a tensor of a module, as torch's `register_parametrization` does; takes no memory of its size."""
    adapted = type(module) if has_adapted_class(module) else adapted_class(module)
    parametrizations = module._modules.get("parametrizations")
    parametrizations = nn.ModuleDict() if parametrizations is None else cast("nn.ModuleDict", parametrizations)
    place = cast("dict[str, Tensor | None]", module._parameters if name in module._parameters else module._buffers)
    parametrizations._modules[name] = _parametrization(store, cast("Tensor", place[name]))
    order = [*module._parameters, *module._buffers]
    parametrizations._modules = dict(sorted(parametrizations._modules.items(), key=lambda item: order.index(item[0])))
    # In this order, since a forward pass may be running (Note [Never torn]).
    module._modules["parametrizations"] = parametrizations
    module.__class__ = adapted
    place[name] = None
    follow_tensors(module)


def _parametrization(store: Store, original: Tensor) -> parametrize.ParametrizationList:
    """torch's ParametrizationList of one parametrization without a `right_inverse`.

    Its own constructor looks for one and sets `original` to itself. That is slow for thousands of layers, and forbidden
    for a tensor of a subclass that a graph still holds.
    """
    parametrization = parametrize.ParametrizationList.__new__(parametrize.ParametrizationList)
    nn.ModuleList.__init__(parametrization)
    vars(parametrization).update(unsafe=True, is_tensor=True, ntensors=1)
    parametrization._modules["0"] = store  # Note [Thousands of modules]
    place = parametrization._parameters if isinstance(original, nn.Parameter) else parametrization._buffers
    cast("dict[str, Tensor | None]", place)["original"] = original
    return parametrization


def unregister(module: nn.Module, name: str, *, keep_value: bool) -> None:
    """Take the adapters off a tensor, by torch's own call: its computed value stays (`keep_value`), or the original."""
    parametrization, kind = live_parametrizations(module)[name], type(module)
    store, original = parametrization._modules["0"], parametrization.original
    # Torch writes the value into the original's memory. A quantised original cannot hold it (Note [Quantised]): a new
    # Parameter does. For a sharded one torch would exchange the memory, which fully_shard goes on using: copy into it.
    value = read(module, name) if keep_value and (is_quantised(original) or is_sharded(original)) else None
    if value is not None and is_sharded(original):
        with torch.no_grad():
            original.copy_(value)
    parametrize.remove_parametrizations(module, name, leave_parametrized=keep_value and value is None)
    if value is not None and value is not original and is_quantised(original):
        module._parameters[name] = nn.Parameter(value.detach(), requires_grad=False)
    if isinstance(store, Bias) and store.created and not keep_value:
        module.register_parameter(name, None)
    if type(module) is not kind and "_glora_adapted" not in vars(kind):
        module.__class__ = _on_base_class(kind)


_plain_classes: weakref.WeakValueDictionary[type[nn.Module], type[nn.Module]] = weakref.WeakValueDictionary()


def _on_base_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass that somebody (fully_shard) has made of one of our classes, made of its base class instead."""
    plain = _plain_classes.get(kind)
    if plain is None:
        bases = tuple([base.__bases__[0] if "_glora_adapted" in vars(base) else base for base in kind.__bases__])
        attributes = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
        made = type(bases[-1])(kind.__name__.replace("Parametrized", ""), bases, attributes)
        plain = _plain_classes[kind] = cast("type[nn.Module]", made)
    return plain
