"""`requires_grad` of the base model's parameters: frozen by `apply`, given back by `merge` and `remove`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from glora.tree import find, own_tensors

# Note [Flags]
# What each parameter's flag was before the first `apply`, and what we last set it to, is kept on its module under its
# name: a Parameter's own attributes do not survive a deep copy, and a record at the root would not be found from a
# submodule or through a wrapper. A flag that is no longer what we set was changed by hand since, and is left alone.
_RECORD = "_glora_flags"


def freeze(model: nn.Module, only: Iterable[nn.Module] | None = None) -> None:
    """Freeze the base model's parameters (those of the modules `only`, if given), and remember how they were."""
    modules = [found.module for found in find(model)] if only is None else list(only)
    parameters = [
        (module, name, tensor)
        for module in modules
        for name, tensor in own_tensors(module).items()
        if isinstance(tensor, nn.Parameter)
    ]
    before = [parameter.requires_grad for _, _, parameter in parameters]  # all first: a tied one is met twice
    for (module, name, parameter), flag in zip(parameters, before, strict=True):
        record: dict[str, tuple[bool, bool]] = module.__dict__.setdefault(_RECORD, {})
        record[name] = (record[name][0] if name in record else flag, False)
        parameter.requires_grad = False  # requires_grad_ refuses lazy parameters


def restore(model: nn.Module) -> None:
    """Give the parameters the flags that they had before the first `freeze`, unless changed by hand since."""
    for found in find(model):
        record: dict[str, tuple[bool, bool]] = found.module.__dict__.pop(_RECORD, {})
        for name, (before, ours) in record.items():
            parameter = own_tensors(found.module).get(name)
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad == ours:
                parameter.requires_grad = before
