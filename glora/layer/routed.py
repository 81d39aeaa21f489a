"""What one module does inside `glora.route`: each sample of the batch through its own adapter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from glora.layer.parametrization import Scales, adapters_of

# Note [Routing]
# A route belongs to the thread or task that entered it: it is a value of a context variable, and nothing of the model
# changes. A module that the route covers splits what it is called with along the batch's dimension into one part for
# each adapter, runs its forward on each part with that adapter alone acting, and puts the results together in the
# batch's order. Modules inside of a module that has split (a head's children) find themselves within one adapter's part
# and run it whole.
#
# Outside of such a call no sample owns an adapted tensor, so that reading it raises (MultiheadAttention reads
# `out_proj.weight`, and so does a fused TransformerEncoderLayer).


@dataclass(frozen=True)
class Cover:
    """What acts on some modules in this thread or task, in place of the adapters that are active.

    Attributes:
        paths: id of each covered module to its path.
        routing: how a call is split; None where nothing is.
        scales: what acts; None where a call has yet to be split.
    """

    paths: Mapping[int, str]
    routing: Routing | None
    scales: Scales | None


# The covers that any thread is under. Whether there is one is all that a plain call looks at, and a compiled one guards
# on; each step on a list is whole, whichever thread comes between.
open_covers: list[object] = []
_covers: ContextVar[tuple[Cover, ...]] = ContextVar("glora_covers", default=())
_ONE = torch.ones((), dtype=torch.float64, device="cpu")


def cover_of(module: nn.Module) -> Cover | None:
    """The innermost cover over the module; None where the active adapters act."""
    for cover in reversed(_covers.get()):
        if id(module) in cover.paths:
            return cover
    return None


def is_routed(module: nn.Module) -> bool:
    """Whether a route that this thread or task is inside of covers the module."""
    return any(cover.routing is not None and id(module) in cover.paths for cover in _covers.get())


@contextmanager
def covered(cover: Cover) -> Generator[None]:
    """Inside the `with` block, in this thread or task, what `cover` says."""
    outer, entry = _covers.get(), object()
    try:
        try:
            open_covers.append(entry)
            _covers.set((*outer, cover))
            yield
        finally:
            _leave(outer, entry)
    finally:  # again: cut off in its midst (Ctrl-C), the first has left something
        _leave(outer, entry)


def _leave(outer: tuple[Cover, ...], entry: object) -> None:
    _covers.set(outer)
    if entry in open_covers:
        open_covers.remove(entry)


def scales_of(module: nn.Module, active: Scales) -> Scales:
    """What acts on the module here and now, for one that has been called.

    Raises:
        RuntimeError: a tensor that is read where no sample owns it.
    """
    cover = cover_of(module)
    if cover is None:
        return active
    if cover.scales is None:
        raise RuntimeError(
            f"Inside glora.route an adapted layer can only be called, since each sample has its own tensors; one of "
            f"{cover.paths[id(module)]!r} was read (nn.MultiheadAttention and fused layers read a layer's weight and "
            f"never call it; so do layers whose forward is replaced on the instance). Leave it out of the adapters "
            f"(exclude=), or run each adapter's samples with glora.activate."
        )
    return cover.scales


def _call(
    module: nn.Module,
    forward: Callable[..., Any],
    at_once: Callable[..., Tensor | None] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """`forward(module, *args, **kwargs)`, split where a route covers the module.

    `at_once`, where the module has one, is asked first: it runs all samples together, or gives None.
    """
    cover = cover_of(module)
    if cover is None or cover.scales is not None or cover.routing is None:
        return forward(module, *args, **kwargs)
    return cover.routing.call(module, cover, forward, at_once, args, kwargs)


# Not compiled: which samples go where is data of each call.
call: Callable[..., Any] = _disable_dynamo(_call)  # torch.compiler.disable imports the compiler, at once


class Routing:
    """Which sample goes through which adapter.

    Args:
        names: for each sample an adapter's name, or None for the base model.
        known: id of each covered module to the adapters that it has.
        dim: the dimension of tensors that the samples are in.
        flattened: whether there may be several rows for each sample in it, one sample's after the other's.
    """

    def __init__(
        self, names: Sequence[str | None], known: Mapping[int, Collection[str]], dim: int = 0, flattened: bool = False
    ) -> None:
        self.names, self.known = list(names), known
        self.dim, self.flattened = dim, flattened
        self.groups: dict[str | None, list[int]] = {}
        for index, name in enumerate(self.names):
            self.groups.setdefault(name, []).append(index)
        order = [index for group in self.groups.values() for index in group]
        self.in_order = order == sorted(order)
        self.back = torch.tensor(order).argsort()
        numbers = {name: number for number, name in enumerate(self.groups)}
        self.owner = torch.tensor([numbers[name] for name in self.names])  # each sample's group
        self.sizes = [len(group) for group in self.groups.values()]
        self.acting: list[Scales] = [{} if name is None else {name: _ONE} for name in self.groups]
        self.checkpoints = _checkpoint_frames()
        self.grad = torch.is_grad_enabled()

    def call(
        self,
        module: nn.Module,
        cover: Cover,
        forward: Callable[..., Any],
        at_once: Callable[..., Tensor | None] | None,
        args: tuple[Any, ...],
        kwargs: Any,
    ) -> Any:
        """The module's forward on each group of samples with its adapter; the results in the batch's order."""
        path = cover.paths[id(module)]
        rows = self._rows(path, (args, kwargs))
        there = {name for store in adapters_of(module).values() for name in store.parts()}
        gone = [name for name in self.groups if name in self.known[id(module)] and name not in there]
        if gone:
            raise RuntimeError(f"{gone[0]!r} was deleted from {path!r} while a glora.route sends samples through it.")
        if at_once is not None and self.dim == 0 and len(self.groups) > 1:
            whole = at_once(module, *args, **kwargs, acting=self.acting, owner=self.owner)
            if whole is not None:
                return whole
        results: list[Any] = []
        for group, scales in zip(self.groups.values(), self.acting, strict=True):
            given, named = (args, kwargs) if len(self.groups) == 1 else self._part((args, kwargs), group, rows)
            with covered(Cover(cover.paths, None, scales)):
                results.append(forward(module, *given, **named))
        return results[0] if len(results) == 1 else self._together(path, results, rows)

    def _rows(self, path: str, given: object) -> int:
        """How many rows the module is called with for each sample; raise where it cannot be split."""
        found = next((leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)), None)
        size = None if found is None or found.ndim <= max(self.dim, 1) else found.shape[self.dim]
        if not size or size % len(self.names) or (size != len(self.names) and not self.flattened):
            shape = None if found is None else tuple(found.shape)
            raise ValueError(
                f"glora.route was given {len(self.names)} names, and {path!r} was called with an input of shape {shape}"
                f", whose dimension {self.dim} is not that many samples. Give one name a sample. Where the model has "
                f"the batch in another dimension, pass dim=; where it flattens samples and tokens into rows, or cuts "
                f"samples into windows, one sample after the other, pass flattened=True."
            )
        if (self.grad or torch.is_grad_enabled()) and _checkpoint_frames() > self.checkpoints:
            raise RuntimeError(
                f"Activation checkpointing inside glora.route would run {path!r} again in the backward pass, where no "
                f"sample has its adapter any more. Enter glora.route inside the checkpointed function, or turn "
                f"checkpointing off."
            )
        return size // len(self.names)

    def _part(self, given: Any, group: list[int], rows: int) -> Any:
        """The arguments for some samples: tensors that have the whole batch, or all its rows, are taken apart."""

        def of(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.ndim <= self.dim:
                return leaf
            each, rest = divmod(leaf.shape[self.dim], len(self.names))
            if rest or each not in (1, rows):
                return leaf
            first, last = group[0], group[-1]
            if last - first + 1 == len(group):
                return leaf.narrow(self.dim, first * each, len(group) * each)
            return leaf.index_select(self.dim, _rows_of(torch.tensor(group), each).to(leaf.device))

        return tree_map(of, given)

    def _together(self, path: str, results: list[Any], rows: int) -> Any:
        """The results of the groups as those of one call, in the batch's order."""

        def join(*parts: Any) -> Any:
            if all(isinstance(part, Tensor) for part in parts):
                held = [part.shape[self.dim] if part.ndim > self.dim else 0 for part in parts]
                for each in (1, rows):
                    if held == [size * each for size in self.sizes]:
                        whole = torch.cat(parts, self.dim)
                        if self.in_order:
                            return whole
                        return whole.index_select(self.dim, _rows_of(self.back, each).to(whole.device))
                same = all(torch.equal(part, parts[0]) for part in parts[1:])
            else:
                same = all(type(part) is type(parts[0]) and part == parts[0] for part in parts[1:])
            if not same:
                raise RuntimeError(
                    f"Inside glora.route a module's results must be one for each sample, in dimension {self.dim}; "
                    f"{path!r} gives something else that differs between the adapters (an auxiliary loss?). Run each "
                    f"adapter's samples with glora.activate."
                )
            return parts[0]

        leaves, structures = zip(*map(tree_flatten, results), strict=True)
        if any(structure != structures[0] for structure in structures):
            raise RuntimeError(f"Inside glora.route {path!r} gives results of different structure for each adapter.")
        return tree_unflatten([join(*parts) for parts in zip(*leaves, strict=True)], structures[0])


def _rows_of(samples: Tensor, each: int) -> Tensor:
    """The indices of these samples' rows."""
    return samples if each == 1 else (samples.unsqueeze(1) * each + torch.arange(each)).flatten()


def _checkpoint_frames() -> int:
    """How many calls of torch's activation checkpointing are under way in this thread."""
    count, frame = 0, sys._getframe()
    while frame is not None:
        count += frame.f_code.co_filename == torch.utils.checkpoint.__file__
        frame = frame.f_back
    return count
