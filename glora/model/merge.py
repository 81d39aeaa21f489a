"""Taking adapters off: baked in, for good or for a while, or dropped."""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Iterable

import torch
from torch import nn

from glora.layer.computed import read
from glora.layer.heads import Head
from glora.layer.parametrization import Bias, Store, stashed, stores_of
from glora.layer.registration import unregister
from glora.layer.swap import merged_tensors, restore, swap_in
from glora.model import flags
from glora.model.adapters import adapter_weights_of, resolve_name, set_acting
from glora.model.change import change, refuse_while_routed, walk_to_take_off
from glora.model.checks import find_ties
from glora.model.guards import unguard
from glora.model.huggingface import unguard_save_pretrained, warn_of_created_biases
from glora.model.replaced import forget
from glora.model.statistics import forget_buffers
from glora.model.walk import Model, Owner
from glora.tensors import gathered, is_quantised, is_sharded
from glora.text import quote_names
from glora.undo import block, undone


def merge(model: Model, *, dequantize: bool = False) -> Model:
    """Bake the active adapters in: plain layers again, with W' and b' for weights and no cost at inference.

    The same as torch's `parametrize.remove_parametrizations` on every adapted tensor, after a check of all of them.
    Parameters keep their identity, keys and order; `requires_grad` is as before the first `apply`, unless changed by
    hand since. Heads keep the active adapter's tensors. A model without adapters is left as it is.
    Under `fully_shard` all ranks merge together, each its own rows, and the model stays sharded
    (Note [Taken off part by part]).

    Args:
        model: the model, or a part of it.
        dequantize: where an adapter acts on a quantised weight, leave W' of the dequantised W0, a new float Parameter.

    Returns:
        The model.

    Raises:
        ValueError: a W' or b' that is not finite after its rounding; an adapter that acts on a quantised weight, unless
            `dequantize`. Nothing has changed then.
        RuntimeError: inside `glora.merged` or `glora.route`; another parametrization stacked on an adapter; a part of
            what `fully_shard` was called on, a tensor that something else has sharded.

    Warns:
        UserWarning: inactive adapters, which are dropped; created biases that stay, and that the config of a model with
            `save_pretrained` does not know.

    Example:
        >>> import torch, glora
        >>> layer = glora.apply(torch.nn.Linear(4, 2), config=glora.GLoRAConfig(init="random"))
        >>> x = torch.randn(3, 4)
        >>> before = layer(x)
        >>> glora.merge(layer)
        Linear(in_features=4, out_features=2, bias=True)
        >>> torch.allclose(layer(x), before, atol=1e-6)
        True
    """
    remedy = (
        "Pass dequantize=True to get float weights (quantise them again then), or go on without a merge: the model "
        "runs, trains and saves as it is."
    )
    with change(model, taking_off=True, reversible=False) as walk, torch.no_grad():
        _check_mergeable(walk, if_quantised=None if dequantize else remedy)
        dropped = sorted({name for o in walk if o.stores for name in o.adapter_names - set(o.acting.adapter_weights)})
        if dropped:  # before anything changes: a warning may be an error
            warnings.warn(
                f"merge bakes in the active adapters alone; dropped: {quote_names(dropped)}. Save them first, or "
                f"use glora.merged(model), which gives everything back.",
                UserWarning,
                stacklevel=2,
            )
        warn_of_created_biases(walk, stacklevel=2)
        for owner in walk:
            # The bias first, while the weight's original is still W0.
            for name, store in sorted(owner.stores.items(), key=lambda item: not isinstance(item[1], Bias)):
                _bake_in(owner.module, name, store)
        _leave_plain(walk)
    return model


def _bake_in(module: nn.Module, name: str, store: Store) -> None:
    unregister(module, name, keep_value=store.is_active() or not isinstance(store, Bias))
    if isinstance(store, Head):
        # Memory of its own: a kept state dict, or an optimizer of the adapter, has the copy's.
        value = read(module, name)
        if not is_sharded(value):
            value.data = value.data.clone()


def _leave_plain(walk: list[Owner]) -> None:
    """Give back what the model had beside its adapters."""
    flags.thaw(walk)
    forget_buffers(walk)
    unguard_save_pretrained(walk)
    unguard(walk)
    forget(walk)


@block
def merged(model: Model) -> Generator[Model]:
    """Run the model merged inside the `with` block, as plain layers with W' and b', and give everything back after it.

    W' and b' are other tensors than the frozen ones, which come back as they were: the same objects, the same bits.
    Inside, the model has plain types and keys, and calls that change adapters raise RuntimeError. Nothing of an adapter
    trains there: W' and b' are constants, and a backward pass that meets nothing else ends in torch's own error. This
    changes the model for every thread, with equal outputs; no thread may be inside a forward pass of torch's own plain
    layers when the block ends. It is the way to compute W' once for several calls.

    Yields:
        The model.

    Raises:
        ValueError: as `glora.merge`, for quantised weights always; nothing has changed then.
        RuntimeError: inside `glora.route`, or another parametrization stacked on an adapter.

    Example:
        >>> import torch, glora
        >>> layer = glora.apply(torch.nn.Linear(4, 2))
        >>> with glora.merged(layer):
        ...     type(layer), list(layer.state_dict())
        (<class 'torch.nn.modules.linear.Linear'>, ['weight', 'bias'])
    """
    refuse_while_routed(model)
    walk = walk_to_take_off(model, for_good=False)
    remedy = (
        "Run the model as it is: adapters on quantised weights need no merge; or glora.merge(copy.deepcopy(model), "
        "dequantize=True)."
    )
    _check_mergeable(walk, if_quantised=remedy)
    modules = [owner.module for owner in walk if owner.stores and owner.module not in stashed]
    with torch.inference_mode(False), torch.no_grad():
        # All memory is taken before the first module is swapped.
        values = [merged_tensors(module) for module in modules]

    def give_back() -> None:
        for module in modules:
            restore(module)

    with undone(give_back):
        for module, tensors in zip(modules, values, strict=True):
            swap_in(module, tensors)
        yield model


def delete(model: Model, name: str) -> Model:
    """Drop one adapter, its heads included. Dropping the last one is `glora.remove`.

    The others keep their weights; where the dropped one was active, they go on without it.

    Args:
        model: the model, or a part of it.
        name: the adapter.

    Returns:
        The model.

    Raises:
        KeyError: no adapter of that name.
        RuntimeError: inside `glora.merged` or `glora.route`; another parametrization beside or on top of an adapter.

    Example:
        >>> import torch, glora
        >>> layer = glora.apply(glora.apply(torch.nn.Linear(4, 2), name="a"), name="b")
        >>> glora.adapters(glora.delete(layer, "b"))
        {'a': 0.0}
    """
    with change(model, taking_off=True) as walk:
        name = resolve_name(walk, name)
        if set(adapter_weights_of(walk)) == {name}:
            _remove(walk)
            return model
        drop(walk, name)
    return model


def drop(walk: Iterable[Owner], name: str) -> None:
    """Take one adapter off, of several, or to put another in its place."""
    for owner in [owner for owner in walk if owner.stores]:
        for tensor_name, store in owner.stores.items():
            store.detach(name)
            if not store.parts():
                unregister(owner.module, tensor_name, keep_value=False)
        if stores_of(owner.module):
            set_acting(owner, owner.acting.adapter_weights)
        else:  # no copy trains in the base's place any more
            flags.thaw_head(owner)


def remove(model: Model) -> Model:
    """Take all adapters off: the very W0 and b0 again (never recomputed), the base model's heads, and no created bias.

    Args:
        model: the model, or a part of it.

    Returns:
        The model; `requires_grad` is as before the first `apply`, unless changed by hand since.

    Raises:
        RuntimeError: inside `glora.merged` or `glora.route`, or another parametrization stacked on an adapter.

    Example:
        >>> import torch, glora
        >>> layer = torch.nn.Linear(4, 2)
        >>> glora.remove(glora.apply(layer)) is layer
        True
    """
    with change(model, taking_off=True) as walk:
        _remove(walk)
    return model


def _remove(walk: list[Owner]) -> None:
    for owner in walk:
        for name in sorted(owner.stores):
            unregister(owner.module, name, keep_value=False)
    _leave_plain(walk)


def _check_mergeable(walk: list[Owner], *, if_quantised: str | None) -> None:
    """Raise ValueError unless every merged tensor is finite and no other module's. Each is computed and dropped.

    Args:
        walk: the model.
        if_quantised: what to do instead where W0 is quantised; None to allow it.
    """
    ties = find_ties(walk)
    for owner in walk:
        if owner.module in stashed:
            continue
        for name, store in owner.stores.items():
            is_head = isinstance(store, Head)
            if not store.is_active() or (is_head and not store.is_rounded(owner.tensors[name])):
                continue
            if not is_head and if_quantised is not None and is_quantised(owner.tensors[name]):
                raise ValueError(
                    f"W' of a quantised W0 has no quantised form; `{name}` of {owner.place!r} is quantised "
                    f"({type(owner.tensors[name]).__name__}), and an adapter acts on it. Nothing was merged. "
                    f"{if_quantised}"
                )
            if not is_head and (id(owner.module), name) in ties:
                raise ValueError(
                    f"A merge must change adapted layers alone; `{name}` of {owner.place!r} is tied to "
                    f"{ties[id(owner.module), name]}, which would change with it. Nothing was merged. Untie them "
                    f"before glora.apply, or run inside glora.merged of the part that was adapted."
                )
            with torch.no_grad():
                value = read(owner.module, name)
                # By the sum first, which takes a fifth of the time. Gathered: the ranks refuse together.
                fit = value.is_meta or math.isfinite(gathered(value.sum()).item())
                unfit = 0 if fit else int(gathered((~torch.isfinite(value)).sum()))
            if unfit:
                raise ValueError(
                    f"A merged tensor must be finite; `{name}` of {owner.place!r} has {unfit} entries in {value.dtype} "
                    f"that are not. Nothing was merged. Look for an adapter that diverged, lower its weight, or merge "
                    f"a float32 copy of the model."
                )
