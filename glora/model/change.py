"""The door: every call that changes a model's adapters for good goes through `change`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from glora.layer import routed
from glora.layer.parametrization import Store, parametrizations_of, stashed
from glora.model.flags import watch_again
from glora.model.replaced import warn_of_replaced
from glora.model.walk import Owner, owners
from glora.undo import uncollected

# Note [One door]
# A call that changes a model is refused inside `glora.merged` and `glora.route`, leaves the model as it was where it
# fails midway, and tells the engines that run the model (fully_shard, DistributedDataParallel) before and after.
# `change` is the one place that knows all of this; its block is given the walk of the model.
#
# An engine is three functions, hung on the door once by its own room in glora/engines.


class Engine(NamedTuple):
    """What a framework that holds a model's tensors in its own way needs to do when the model is changed.

    Attributes:
        enter: given the model, before its tensors are read or changed.
        refuse: given the model, its walk and whether the adapters come off for good; raises where they cannot.
        leave: given the model, after a change that succeeded. `enter` also comes before a mere read: the two do not
            pair.
    """

    enter: Callable[[nn.Module], None]
    refuse: Callable[[nn.Module, list[Owner], bool], None]
    leave: Callable[[nn.Module], None]


engines: list[Engine] = []


@contextmanager
def change(model: nn.Module, *, taking_off: bool = False, reversible: bool = True) -> Generator[list[Owner]]:
    """Inside the `with` block the model is changed; if an exception ends the block, it is as before.

    Args:
        model: the model.
        taking_off: whether adapters come off, so that they must be alone on their tensors.
        reversible: whether what is changed can be put back, as swapped objects can; overwritten numbers cannot.

    Yields:
        The walk of the model. Tensors made in the block are made outside of inference mode, since one that was made
        inside could never be trained.

    Raises:
        RuntimeError: inside `glora.merged` or `glora.route`; with `taking_off`, another parametrization stacked on an
            adapter, or tensors that an engine cannot give back.
    """
    refuse_while_swapped(model)
    walk = walk_to_take_off(model, for_good=True) if taking_off else walk_to_read(model)
    with torch.inference_mode(False), uncollected(), _all_or_nothing(walk if reversible else []):
        yield walk
        for engine in engines:
            engine.leave(model)


def walk_to_read(model: nn.Module) -> list[Owner]:
    """The walk of a model whose tensors are read: the engines have put them where they belong."""
    for engine in engines:
        engine.enter(model)
    walk = owners(model)
    warn_of_replaced(walk)
    return walk


def walk_to_take_off(model: nn.Module, *, for_good: bool) -> list[Owner]:
    """The walk of a model whose adapters can be taken off, for good or for a while; raise where they cannot."""
    walk = walk_to_read(model)
    refuse_stacked(walk)
    for engine in engines:
        engine.refuse(model, walk, for_good)
    return walk


def refuse_while_merged(model: nn.Module) -> None:
    """Raise RuntimeError inside `glora.merged`."""
    for owner in owners(model) if stashed else ():
        if owner.module in stashed:
            raise RuntimeError(
                f"Inside glora.merged the adapters are set aside and cannot be changed (found {owner.place!r} merged). "
                f"Leave the `with` block first."
            )


def refuse_while_routed(model: nn.Module) -> None:
    """Raise RuntimeError inside `glora.route`, in the thread or task that entered it."""
    for owner in owners(model) if routed.active_routes else ():
        if routed.is_routed(owner.module):
            raise RuntimeError(
                f"Inside glora.route each sample has its adapter, and none can be changed (found {owner.place!r} "
                f"routed). Leave the `with` block first."
            )


def refuse_while_swapped(model: nn.Module) -> None:
    """Raise RuntimeError inside `glora.merged` and `glora.route`."""
    refuse_while_merged(model)
    refuse_while_routed(model)


def refuse_stacked(walk: Iterable[Owner]) -> None:
    """Raise RuntimeError where a parametrization of somebody else's stands beside or on top of adapters."""
    for owner in walk:
        stores = owner.stores
        for name, parametrization in parametrizations_of(owner.module).items() if stores else ():
            others = list(parametrization)[1 if name in stores else 0 :]
            if others:
                raise RuntimeError(
                    f"Adapters must be alone on a layer to be baked in or taken off; `{name}` of {owner.place!r} is "
                    f"parametrized by {type(others[0]).__name__} too. Remove that first, or bake all in with "
                    f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})."
                )


# Note [All or nothing]
# What changes a model prepares everything first, and then swaps objects that are all there. Should that still be cut
# off (no memory, Ctrl-C), every module gets back the attributes, and every parameter the flag, that it had: a change
# only replaces entries of these dictionaries.
@contextmanager
def _all_or_nothing(walk: Iterable[Owner]) -> Generator[None]:
    modules = [module for owner in walk for module in _changeable(owner)]
    attributes = [(module, module.__class__, _copy(vars(module))) for module in modules]
    flags = [(parameter, parameter.requires_grad) for module in modules for parameter in _parameters(module)]
    acting = [(module.acting, module.acting.adapter_weights) for module in modules if isinstance(module, Store)]
    try:
        yield
    except BaseException:
        for module, kind, before in attributes:
            _write_back(vars(module), before)
            module.__class__ = kind
        for shared, adapter_weights in acting:
            shared.adapter_weights = adapter_weights
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad = flag  # requires_grad_ refuses lazy parameters
        for store in [module for module in modules if isinstance(module, Store)]:
            watch_again(store)
        raise


def _changeable(owner: Owner) -> Iterator[nn.Module]:
    """A module, and what parametrizes it down to each adapter's part: nothing inside of a part is ever swapped."""
    yield owner.module
    if owner.stores:
        yield cast("nn.Module", owner.module._modules["parametrizations"])
        yield from parametrizations_of(owner.module).values()
        for store in owner.stores.values():
            yield store
            yield from store.parts().values()


def _parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    if isinstance(module, Store):
        return module.parameters()
    return iter([parameter for parameter in module._parameters.values() if parameter is not None])


# torch's own, which a change writes into. A user's may be of a kind that forbids it (diffusers' FrozenDict).
_DICTIONARIES = (dict, OrderedDict)


def _copy(attributes: dict[str, Any]) -> dict[str, Any]:
    return {key: value.copy() if type(value) in _DICTIONARIES else value for key, value in attributes.items()}


def _write_back(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    for key in [key for key in attributes if key not in before]:
        del attributes[key]
    for key, value in before.items():
        now = attributes.get(key)
        if type(value) in _DICTIONARIES and isinstance(now, dict):  # the same dictionary: others may hold it
            cast("dict[Any, Any]", now).clear()
            cast("dict[Any, Any]", now).update(cast("dict[Any, Any]", value))
        else:
            attributes[key] = value
