"""Buffers that training changes: running statistics belong to the adapter, and other buffers are named."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator

from torch import Tensor, nn

from glora.fingerprint import Fingerprint, agrees, end_of, fingerprint
from glora.layer.heads import HeadCopy
from glora.model.records import PlannedHead
from glora.model.walk import Owner
from glora.spec import join
from glora.text import format_names

# Note [Running statistics]
# A training forward writes into buffers of the base model (BatchNorm's), under an adapter as without one. So each
# adapter has copies of the running statistics of all modules that keep some: its training changes these, its file
# holds them, and `disabled` and `remove` give the base's. They are held as a head's buffers are; a head has its own.
#
# Which other modules write into their buffers cannot be known before. Their buffers are noted as an adapter comes, and
# named when one is saved, should they have changed.
_RUNNING = {"running_mean", "running_var"}

_noted: weakref.WeakKeyDictionary[nn.Module, dict[str, Fingerprint]] = weakref.WeakKeyDictionary()


def plan_statistics(walk: Iterable[Owner], heads: Collection[PlannedHead]) -> tuple[PlannedHead, ...]:
    """The modules that keep running statistics, and are no heads."""
    taken = {id(head.module) for head in heads}
    return tuple(
        PlannedHead(owner, tuple(names))
        for owner in walk
        if id(owner.module) not in taken and (names := _statistics(owner))
    )


def _statistics(owner: Owner) -> list[str]:
    """The persistent buffers of a module that keeps running statistics, as torch's norms do."""
    names = [name for name in owner.tensors if name in owner.module._buffers]
    tensors = [owner.tensors[name] for name in names]
    fit = all(type(tensor) is Tensor and not tensor.is_inference() for tensor in tensors)
    foreign = nn.utils.parametrize.is_parametrized(owner.module) and not owner.stores
    return names if set(names) >= _RUNNING and fit and not foreign else []


def kept_statistics(walk: Iterable[Owner], name: str) -> Iterator[tuple[Owner, tuple[str, ...]]]:
    """The modules of whose running statistics this adapter has copies, and the names of the buffers."""
    for owner in walk:
        copies = tuple(key for key, store in owner.stores.items() if isinstance(store.parts().get(name), HeadCopy))
        if set(copies) >= _RUNNING and not any(isinstance(owner.tensors[key], nn.Parameter) for key in copies):
            yield owner, copies


def note_buffers(walk: Iterable[Owner]) -> None:
    """Note the buffers that no adapter has, where they are not noted yet."""
    for owner in walk:
        known = {key: fingerprint(end_of(buffer)) for key, buffer in _buffers(owner)}
        if known:
            _noted.setdefault(owner.module, {key: numbers for key, numbers in known.items() if numbers})


def forget_buffers(walk: Iterable[Owner]) -> None:
    """Forget what was noted."""
    for owner in walk:
        _noted.pop(owner.module, None)


def warn_of_changed_buffers(walk: Iterable[Owner], *, stacklevel: int) -> None:
    """Warn of the buffers that were noted, and have changed since: the adapter's file does not hold them."""
    changed: list[str] = []
    for owner in walk:
        noted = _noted.get(owner.module, {})
        for key, buffer in _buffers(owner) if noted else ():
            if key in noted and not agrees(end_of(buffer), noted[key]):
                changed.append(join(owner.path, key))
    if changed:
        warnings.warn(
            f"What training changes should be in the adapter's file; buffers of the base model have changed since the "
            f"adapter was attached, and are not: {format_names(changed)}. Their modules write into them in training. "
            f"Call .eval() on these, or train them beside the adapter with trainable=.",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def _buffers(owner: Owner) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in owner.tensors.items():
        if key in owner.module._buffers and key not in owner.stores and tensor.is_floating_point():
            yield key, tensor
