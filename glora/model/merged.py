"""Baking the active adapters in, for good or for a while."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from glora.layer.computed import read
from glora.layer.heads import Head
from glora.layer.parametrization import Bias, stashed
from glora.layer.registration import unregister
from glora.layer.swap import merged_tensors, restore, swap_in
from glora.model import freezing
from glora.model.checks import find_ties, refuse_stacked, refuse_while_routed, refuse_while_swapped
from glora.model.exports import unguard_save_pretrained, warn_of_created_biases
from glora.model.relocated import refuse_divided, update_fsdp_locations
from glora.model.sharded import reshard
from glora.model.walk import Model, Owner, owners
from glora.tensors import gathered, is_quantised, is_sharded
from glora.text import quote_names


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
    refuse_while_swapped(model)
    reshard(model)
    modules = _mergeable_modules(
        model,
        for_good=True,
        if_quantised=None
        if dequantize
        else "Pass dequantize=True to get float weights (quantise them again then), or go on without a merge: the "
        "model runs, trains and saves as it is.",
    )
    dropped = sorted({name for n in modules if n.stores for name in n.adapter_names - set(n.acting.adapter_weights)})
    if dropped:  # before anything changes: a warning may be an error
        warnings.warn(
            f"merge bakes in the active adapters alone; dropped: {quote_names(dropped)}. Save them first, or "
            f"use glora.merged(model), which gives everything back.",
            UserWarning,
            stacklevel=2,
        )
    warn_of_created_biases(model, modules, stacklevel=2)
    with torch.inference_mode(False), torch.no_grad():
        for named in modules:
            # The bias first, while the weight's original is still W0.
            for name, store in sorted(named.stores.items(), key=lambda item: not isinstance(item[1], Bias)):
                unused = isinstance(store, Bias) and not store.is_active()
                unregister(named.module, name, keep_value=not unused)
                if isinstance(store, Head):
                    # Memory of its own: a kept state dict, or an optimizer of the adapter, has the copy's.
                    value = read(named.module, name)
                    if not is_sharded(value):
                        value.data = value.data.clone()
    freezing.restore(modules)
    update_fsdp_locations(model)
    unguard_save_pretrained(model)
    return model


@contextmanager
def merged(model: Model) -> Generator[Model]:
    """Run the model merged inside the `with` block, as plain layers with W' and b', and give everything back after it.

    W' and b' are other tensors than the frozen ones, which come back as they were: the same objects, the same bits.
    Inside, the model has plain types and keys, and calls that change adapters raise RuntimeError. This changes the
    model for every thread, with equal outputs; no thread may be inside a forward pass of torch's own plain layers when
    the block ends. It is the way to compute W' once for several calls.

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
    reshard(model)
    modules = _mergeable_modules(
        model,
        for_good=False,
        if_quantised="Run the model as it is: adapters on quantised weights need no merge; or "
        "glora.merge(copy.deepcopy(model), dequantize=True).",
    )
    with torch.inference_mode(False), torch.no_grad():
        # All memory is taken before the first module is swapped.
        carriers = [named.module for named in modules if named.stores and named.module not in stashed]
        values = [merged_tensors(module) for module in carriers]
    try:
        try:
            for module, tensors in zip(carriers, values, strict=True):
                swap_in(module, tensors)
            yield model
        finally:
            _restore(carriers)
    finally:  # again: cut off in its midst (Ctrl-C), the first has left something
        _restore(carriers)


def _restore(carriers: list[nn.Module]) -> None:
    for module in carriers:
        restore(module)


def _mergeable_modules(model: nn.Module, *, for_good: bool, if_quantised: str | None) -> list[Owner]:
    """The model's modules; raise unless every merged tensor is finite and ours alone to merge.

    Each is computed, looked at and dropped.

    Args:
        model: the model.
        for_good: plain layers are to stay, and not for the time of a block.
        if_quantised: what to do instead where W0 is quantised; None to allow it.
    """
    modules = owners(model)
    refuse_stacked(modules)
    refuse_divided(model, modules, for_good=for_good)
    ties = find_ties(modules)
    for named in modules:
        if named.module in stashed:
            continue
        for name, store in named.stores.items():
            if isinstance(store, Head) or not store.is_active():
                continue
            if if_quantised is not None and is_quantised(named.tensors[name]):
                raise ValueError(
                    f"W' of a quantised W0 has no quantised form; `{name}` of {named.path or 'the model itself'!r} is "
                    f"quantised ({type(named.tensors[name]).__name__}), and an adapter acts on it. Nothing was merged. "
                    f"{if_quantised}"
                )
            if (id(named.module), name) in ties:
                raise ValueError(
                    f"A merge must change adapted layers alone; `{name}` of {named.path or 'the model itself'!r} is "
                    f"tied to {ties[id(named.module), name]}, which would change with it. Nothing was merged. Untie "
                    f"them before glora.apply, or run inside glora.merged of the part that was adapted."
                )
            with torch.no_grad():
                value = read(named.module, name)
                # Gathered: the ranks refuse together.
                unfit = 0 if value.is_meta else int(gathered((~torch.isfinite(value)).sum()))
            if unfit:
                raise ValueError(
                    f"A merged tensor must be finite; `{name}` of {named.path or 'the model itself'!r} has "
                    f"{unfit} entries in {value.dtype} that are not. Nothing was merged. "
                    f"Look for an adapter that diverged, lower its weight, or merge a float32 copy of the model."
                )
    return modules
