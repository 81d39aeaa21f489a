"""Putting adapters on a tensor of a module, and taking them off."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from glora.layer.adapted import adapted_class, read
from glora.layer.parametrization import Adapters, Bias, adapters_of, has_adapted_class, live_stacks
from glora.quantised import is_quantised


def register(module: nn.Module, name: str, store: Adapters) -> None:
    """Put adapters on a tensor of a module, as torch's `register_parametrization` does; takes no memory of its size."""
    adapted = adapted_class(module)
    lists = module._modules.get("parametrizations")
    lists = nn.ModuleDict() if lists is None else cast("nn.ModuleDict", lists)
    place = cast("dict[str, Tensor | None]", module._parameters if name in module._parameters else module._buffers)
    lists[name] = _parametrization(store, cast("Tensor", place[name]))
    own = [*module._parameters, *module._buffers]
    lists._modules = dict(sorted(lists._modules.items(), key=lambda item: own.index(item[0])))
    # In this order, since a forward pass may be under way (Note [Never torn]).
    module._modules["parametrizations"] = lists
    module.__class__ = adapted if not has_adapted_class(module) else type(module)
    place[name] = None


def _parametrization(store: Adapters, original: Tensor) -> parametrize.ParametrizationList:
    # unsafe: torch would otherwise compute the tensor once, to check a dtype that we know.
    if not is_quantised(original):
        return parametrize.ParametrizationList([store], original, unsafe=True)
    # torch swaps a tensor of a subclass with itself, which a graph that still holds it forbids.
    stack = parametrize.ParametrizationList([store], nn.Parameter(torch.empty(0), requires_grad=False), unsafe=True)
    stack.original = cast("nn.Parameter", original)
    return stack


def unregister(module: nn.Module, name: str, *, keep_value: bool) -> None:
    """Take the adapters off a tensor: its computed value stays (`keep_value`), or the original, by torch's own call."""
    store, original = adapters_of(module)[name], live_stacks(module)[name].original
    # A quantised original cannot take the value (Note [Quantised]): another Parameter does.
    value = read(module, name) if keep_value and is_quantised(original) else None
    parametrize.remove_parametrizations(module, name, leave_parametrized=keep_value and value is None)
    if value is not None and value is not original:
        module._parameters[name] = nn.Parameter(value.detach(), requires_grad=False)
    if isinstance(store, Bias) and store.created and not keep_value:
        module.register_parameter(name, None)
