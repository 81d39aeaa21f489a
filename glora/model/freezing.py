"""`requires_grad` of the base model's parameters: frozen by `apply`, given back by `merge` and `remove`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from torch import nn

from glora.model.walk import Owner

# Note [Flags]
# What each parameter's flag was before the first `apply`, and what we last set it to, is kept on its module under its
# name: a Parameter's own attributes do not survive a deep copy, and a record at the root would not be found from a
# submodule or through a wrapper. A flag that is no longer what we set was changed by hand since, and is left alone.
# A base head's tensors are frozen without the rest under `freeze=False`, as long as an adapter has copies of them.
_RECORD = "_glora_flags"
_Record: TypeAlias = dict[str, tuple[bool, bool]]
"""Tensor name to the flag before, and whether the whole model was frozen (rather than this head alone)."""


def freeze(modules: Iterable[Owner], *, whole: bool) -> None:
    """Freeze the base tensors of some modules, and remember how they were; `whole`: of the whole model."""
    parameters = [
        (named.module, name, tensor)
        for named in modules
        for name, tensor in named.tensors.items()
        if isinstance(tensor, nn.Parameter)
    ]
    before = [parameter.requires_grad for _, _, parameter in parameters]  # all first: a tied one is met twice
    for (module, name, parameter), flag in zip(parameters, before, strict=True):
        record: _Record = module.__dict__.setdefault(_RECORD, {})
        first, also_whole = record.get(name, (flag, False))
        record[name] = first, whole or also_whole
        if flag:
            parameter.requires_grad = False  # requires_grad_ refuses lazy parameters


def restore(modules: Iterable[Owner]) -> None:
    """Give base tensors the flags that they had before the first `freeze`, unless changed by hand since."""
    for named in modules:
        _give_back(named, named.module.__dict__.pop(_RECORD, {}))


def thaw_head(named: Owner) -> None:
    """Give a head's parameters their flags back where they were frozen as a head's alone."""
    record: _Record = named.module.__dict__.get(_RECORD, {})
    _give_back(named, {name: record.pop(name) for name, (_, whole) in list(record.items()) if not whole})


def _give_back(named: Owner, record: _Record) -> None:
    for name, (before, _) in record.items():
        parameter = named.tensors.get(name)
        if isinstance(parameter, nn.Parameter) and not parameter.requires_grad:
            parameter.requires_grad = before
