"""`requires_grad`: what was frozen, by whom, and what it gets back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias, cast

from torch import nn

from glora.layer import pending
from glora.layer.parametrization import Store
from glora.model.walk import Owner
from glora.tensors import is_sharded

# Note [Flags]
# Two things are frozen: the base model's parameters, from the first `apply` to `merge` or `remove`, and an adapter's
# own while it does not act. Either way the flags from before are kept on the module that holds the parameters, under
# their names: a Parameter's own attributes do not survive a deep copy, and a record at the root would not be found
# from a submodule or through a wrapper. A parameter that asks for a gradient in spite of its record was set by hand
# since, and keeps its gradient when flags are given back. Without `freeze`, the original tensors of a head alone are
# frozen, as long as an adapter has copies.
_RECORD = "_glora_flags"
_Record: TypeAlias = dict[str, tuple[bool, bool]]
"""Name to the flag before, and whether the whole model was frozen then (rather than this head alone)."""


def freeze(walk: Iterable[Owner], *, whole_model: bool) -> None:
    """Freeze the base tensors of these modules; `whole_model`: they are all of the model's."""
    held = [(owner.module, name, p) for owner in walk for name, p in _parameters(owner).items()]
    before = [parameter.requires_grad for _, _, parameter in held]  # all first: a tied one is met twice
    for (module, name, parameter), flag in zip(held, before, strict=True):
        _freeze(module, name, parameter, flag, whole_model)


def thaw(walk: Iterable[Owner]) -> None:
    """Give base tensors the flags that they had before the first `freeze`."""
    for owner in walk:
        _thaw(vars(owner.module).pop(_RECORD, {}), _parameters(owner))


def thaw_head(owner: Owner) -> None:
    """Give a head's parameters their flags back where they were frozen as a head's alone."""
    record: _Record = vars(owner.module).get(_RECORD, {})
    alone = {name: record.pop(name) for name, (_, whole_model) in list(record.items()) if not whole_model}
    _thaw(alone, _parameters(owner))


def follow_activity(store: Store) -> None:
    """Freeze the adapters that may not train on this tensor; the others get their flags back."""
    for name, part in store.parts().items():
        if not store.may_train(name):
            for key, parameter in part.named_parameters():
                if is_sharded(parameter) and name not in store.acting.adapter_weights:
                    continue  # fully_shard sums gradients past the hooks of Note [Pending graphs]
                if parameter.requires_grad:
                    pending.watch(part, parameter)  # Note [Pending graphs]
                _freeze(part, key, parameter, parameter.requires_grad, whole_model=False)
        elif _RECORD in vars(part):
            _thaw(vars(part)[_RECORD], dict(part.named_parameters()))
            del vars(part)[_RECORD]  # cut off before, it is done again
            pending.forget(part)


def watch_again(store: Store) -> None:
    """Let the hooks on frozen adapters (Note [Pending graphs]) follow flags that were put back."""
    for part in store.parts().values():
        record: _Record = vars(part).get(_RECORD, {})
        if not record:
            pending.forget(part)
        elif not pending.is_watched(part):
            for name, parameter in part.named_parameters():
                if record[name][0]:
                    parameter.requires_grad = True  # a hook is put on nothing else
                    pending.watch(part, parameter)
                    parameter.requires_grad = False


def _parameters(owner: Owner) -> dict[str, nn.Parameter]:
    return {name: tensor for name, tensor in owner.tensors.items() if isinstance(tensor, nn.Parameter)}


def _freeze(holder: nn.Module, name: str, parameter: nn.Parameter, flag: bool, whole_model: bool) -> None:
    record = cast("_Record", vars(holder).setdefault(_RECORD, {}))
    first, before = record.get(name, (flag, False))
    record[name] = first, whole_model or before
    if parameter.requires_grad:
        parameter.requires_grad = False  # requires_grad_ refuses lazy parameters


def _thaw(record: _Record, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, (flag, _) in record.items():
        parameter = parameters.get(name)
        if parameter is not None and not parameter.requires_grad:
            parameter.requires_grad = flag
