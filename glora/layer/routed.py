"""One module inside `glora.route`: each sample of the batch goes through its own adapter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from glora.functional import ONE
from glora.layer.batched import Layout, gathers
from glora.layer.parametrization import DISABLED, AdapterWeights, Store, Weight, stores_of
from glora.torch_internals import not_compiled, tree_flatten, tree_leaves, tree_map, tree_unflatten
from glora.undo import undone

# Note [Routing]
# A route belongs to the thread or task that entered it: it is the value of a context variable, and changes nothing in
# the model. A routed module splits its arguments along the batch's dimension into a group for each adapter, runs its
# forward on each group with that adapter alone active, and joins the results in the batch's order. Modules inside it (a
# head's children) run within one adapter's group, and do not split again.
#
# `glora.disabled` wins over a route, whichever is entered first and by whichever thread: a module that is disabled runs
# as the base's, and does not split.
#
# Note [Flattened]
# With `flattened=True` a layer may be given `(batch * tokens, features)` in place of `(batch, tokens, features)`. How
# many samples there are in a row does not show, so that the tokens are counted: a layer that has the whole batch in its
# dimension tells how many each sample has, and one that has it flattened must have as many; where none came before, the
# first one counts. A forward of the model begins where its first routed layer is called again.
#
# Outside of such a call an adapted tensor has no single value, and reading it raises (MultiheadAttention reads
# `out_proj.weight`, and so does a fused TransformerEncoderLayer).


@dataclass(frozen=True)
class Route:
    """The adapters that act on some modules in this thread or task, in place of the active ones.

    Attributes:
        paths: id of each routed module to its path.
        routing: how a call is split; None where it is not.
        adapter_weights: the adapters that act; None where a call has yet to be split.
    """

    paths: Mapping[int, str]
    routing: Routing | None
    adapter_weights: AdapterWeights | None


_REMEDY = "Leave it out of the adapters (exclude=), or run each adapter's samples with glora.activate."

# One entry for each route that any thread has entered. A plain call only checks whether the list is empty, and a
# compiled one guards on that. List operations are atomic.
active_routes: list[object] = []
_routes: ContextVar[tuple[Route, ...]] = ContextVar("glora_routes", default=())


def route_of(module: nn.Module) -> Route | None:
    """The innermost route of the module; None where the active adapters act."""
    for route in reversed(_routes.get()):
        if id(module) in route.paths:
            return route
    return None


def is_routed(module: nn.Module) -> bool:
    """Whether this thread or task is inside a route of the module that splits calls."""
    return any(route.routing is not None and id(module) in route.paths for route in _routes.get())


@contextmanager
def enter(route: Route) -> Generator[None]:
    """Inside the `with` block the route holds, in this thread or task."""
    outer, entry = _routes.get(), object()

    def leave() -> None:
        _routes.set(outer)
        if entry in active_routes:
            active_routes.remove(entry)

    with undone(leave):
        active_routes.append(entry)
        _routes.set((*outer, route))
        yield


def adapter_weights_of(module: nn.Module, active: AdapterWeights) -> AdapterWeights:
    """The adapters that act on the module in this thread or task: `active`, where no route is over it.

    Raises:
        RuntimeError: a tensor is read outside of a call, where it has no single value.
    """
    route = route_of(module)
    if route is None or active is DISABLED:
        return active
    if route.adapter_weights is None:
        raise RuntimeError(
            f"Inside glora.route an adapted layer can only be called, since each sample has its own tensors; one of "
            f"{route.paths[id(module)]!r} was read (nn.MultiheadAttention and fused layers read a layer's weight and "
            f"never call it; so do layers whose forward is replaced on the instance). Leave it out of the adapters "
            f"(exclude=), or run each adapter's samples with glora.activate."
        )
    return route.adapter_weights


@not_compiled  # which adapter a sample goes through is data of each call
def call(
    module: nn.Module,
    forward: Callable[..., Any],
    per_sample: Callable[..., Tensor | None] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """`forward(module, *args, **kwargs)`, split where a route of the module says so.

    `per_sample`, where the module has one, is tried first: it runs all samples in one call, or returns None.
    """
    route = route_of(module)
    if route is None or route.adapter_weights is not None or route.routing is None:
        return forward(module, *args, **kwargs)
    return route.routing.call(module, route, forward, per_sample, args, kwargs)


class Routing:
    """Which sample goes through which adapter.

    Args:
        names: for each sample an adapter's name, or None for the base model.
        known: id of each routed module to the adapters that it has.
        layouts: id of each routed module to where it has the batch.
        flattened: whether a sample may have several rows in that dimension, one sample's after the other's.
    """

    def __init__(
        self,
        names: Sequence[str | None],
        known: Mapping[int, Collection[str]],
        layouts: Mapping[int, Layout],
        flattened: bool = False,
    ) -> None:
        self.names, self.known = list(names), known
        self.layouts, self.flattened = layouts, flattened
        self.groups: dict[str | None, list[int]] = {}
        for index, name in enumerate(self.names):
            self.groups.setdefault(name, []).append(index)
        order = [index for group in self.groups.values() for index in group]
        self.in_order = order == sorted(order)
        self.back = torch.tensor(order).argsort()
        numbers = {name: number for number, name in enumerate(self.groups)}
        self.owner = torch.tensor([numbers[name] for name in self.names])  # each sample's group
        self.sizes = [len(group) for group in self.groups.values()]
        self.acting: list[AdapterWeights] = [{} if name is None else {name: ONE} for name in self.groups]
        self.checkpoints = _checkpoint_frames()
        self.grad = torch.is_grad_enabled()
        self.began: int | None = None  # the first module of this forward of the model
        self.tokens: set[int] = set()  # how many tokens a sample has had in it

    def call(
        self,
        module: nn.Module,
        route: Route,
        forward: Callable[..., Any],
        per_sample: Callable[..., Tensor | None] | None,
        args: tuple[Any, ...],
        kwargs: Any,
    ) -> Any:
        """The module's forward on each group of samples with its adapter; the results in the batch's order."""
        path, by_name = route.paths[id(module)], stores_of(module)
        stores = list(by_name.values())
        if stores and stores[0].acting.adapter_weights is DISABLED:
            with enter(Route(route.paths, None, DISABLED)):
                return forward(module, *args, **kwargs)
        layout = self.layouts[id(module)]
        rows = self._rows(path, module, layout, tree_leaves((args, kwargs)), any(map(_is_batched, stores)))
        attached = {name for store in stores for name in store.parts()}
        deleted = [name for name in self.groups if name in self.known[id(module)] and name not in attached]
        if deleted:
            raise RuntimeError(
                f"{deleted[0]!r} was deleted from {path!r} while a glora.route sends samples through it."
            )
        if module.training and len(self.groups) > 1 and any(name in module._buffers for name in by_name):
            raise RuntimeError(
                f"Running statistics of several adapters cannot be trained in one batch; {path!r} keeps some, and is "
                f"in training mode. Call .eval() on it, or run each adapter's samples with glora.activate."
            )
        if per_sample is not None and layout.dim == 0 and len(self.groups) > 1:
            result = per_sample(module, *args, **kwargs, acting=self.acting, owner=self.owner)
            if result is not None:
                return result
        if len(self.groups) == 1:
            with enter(Route(route.paths, None, self.acting[0])):
                return forward(module, *args, **kwargs)
        arguments = {**dict(zip(layout.names, args, strict=False)), **kwargs}
        args = args[len(layout.names) :]
        results: list[Any] = []
        for group, adapter_weights in zip(self.groups.values(), self.acting, strict=True):
            group_args = self._select(args, group, rows, layout.dim)
            group_kwargs = {
                name: self._select(value, group, *_place_of(name, value, module, layout, rows))
                for name, value in arguments.items()
            }
            with enter(Route(route.paths, None, adapter_weights)):
                results.append(forward(module, *group_args, **group_kwargs))
        return self._join(path, results, rows, layout)

    def _rows(self, path: str, module: nn.Module, layout: Layout, leaves: list[Any], experts: bool) -> int:
        """How many rows each sample has in the module's arguments; raise where they cannot be split."""
        dim, samples = layout.dim, len(self.names)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        first = tensors[0] if tensors else None
        unfit = first is None or first.ndim <= max(dim, 1) or layout.ndim not in (None, first.ndim)
        size = None if first is None or unfit else first.shape[dim]
        if first is None or not size or size % samples or (size != samples and not self.flattened):
            shape = None if first is None else tuple(first.shape)
            batched = "" if layout.ndim is None else f" (of {layout.ndim} dimensions, as {type(module).__name__} has)"
            raise ValueError(
                f"glora.route was given {samples} names, and {path!r} was called with an input of shape {shape}"
                f", whose dimension {dim} is not that many samples{batched}. Give one name a sample. Where the model "
                f"has the batch in another dimension, pass dim=; where it flattens samples and tokens into rows, or "
                f"cuts samples into windows, one sample after the other, pass flattened=True."
            )
        if (self.grad or torch.is_grad_enabled()) and _checkpoint_frames() > self.checkpoints:
            raise RuntimeError(
                f"Activation checkpointing inside glora.route would run {path!r} again in the backward pass, where no "
                f"sample has its adapter any more. Enter glora.route inside the checkpointed function, or turn "
                f"checkpointing off."
            )
        if len(self.groups) > 1 and gathers(path, experts, tensors):
            raise ValueError(
                f"glora.route must know whose rows a layer is given; {path!r} may be given tokens that a router has "
                f"picked, or repeated for each expert, here {tuple(first.shape)}. {_REMEDY}"
            )
        if self.flattened:
            self._check_tokens(path, module, layout, first)
        return size // samples

    def _check_tokens(self, path: str, module: nn.Module, layout: Layout, first: Tensor) -> None:
        """Raise ValueError unless the samples have as many tokens here as before (Note [Flattened])."""
        samples, shape = len(self.names), tuple(first.shape)
        if self.began in (None, id(module)):
            self.began, self.tokens = id(module), set()
        tokens = first.numel() // max(shape[layout.channels], 1) // samples
        if shape[layout.dim] == samples or not self.tokens:
            self.tokens.add(tokens)
        elif len(self.groups) > 1 and tokens not in self.tokens:
            raise ValueError(
                f"glora.route(flattened=True) takes rows that are each sample's tokens; {path!r} is given {tokens} for "
                f"a sample, of shape {shape}, where layers before it were given {sorted(self.tokens)}: they may be "
                f"repeated, padded or picked. {_REMEDY}"
            )
        between = [size for at, size in enumerate(shape[:-1]) if at != layout.dim]
        if len(self.groups) > 1 and shape[layout.dim] != samples and samples in between:
            raise ValueError(
                f"glora.route(flattened=True) must know which dimension has the batch; {path!r} is given {shape}, "
                f"which may have the {samples} samples in another one than {layout.dim}. Pass dim= then. {_REMEDY}"
            )

    def _select(self, arguments: Any, group: list[int], rows: int, dim: int | None) -> Any:
        """The arguments for some samples: of tensors with a row for each sample, or with all rows, their rows."""

        def of(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or dim is None or leaf.ndim <= dim:
                return leaf
            each, rest = divmod(leaf.shape[dim], len(self.names))
            if rest or each not in (1, rows):
                return leaf
            first, last = group[0], group[-1]
            if last - first + 1 == len(group):
                return leaf.narrow(dim, first * each, len(group) * each)
            return leaf.index_select(dim, _rows_of(torch.tensor(group), each).to(leaf.device))

        return tree_map(of, arguments)

    def _join(self, path: str, results: list[Any], rows: int, layout: Layout) -> Any:
        """The results of the groups as the result of one call, in the batch's order."""

        def join(at: int, *parts: Any) -> Any:
            dim = layout.results.get(at, layout.dim)
            if all(isinstance(part, Tensor) for part in parts):
                sizes = [part.shape[dim] if part.ndim > dim else 0 for part in parts]
                for each in (1, rows):
                    if sizes == [size * each for size in self.sizes]:
                        joined = torch.cat(parts, dim)
                        if self.in_order:
                            return joined
                        return joined.index_select(dim, _rows_of(self.back, each).to(joined.device))
                same = all(torch.equal(part, parts[0]) for part in parts[1:])
            else:
                same = all(type(part) is type(parts[0]) and part == parts[0] for part in parts[1:])
            if not same:
                raise RuntimeError(
                    f"Inside glora.route a module's results must be one for each sample, in dimension {dim}; "
                    f"{path!r} gives something else that differs between the adapters (an auxiliary loss?). Run each "
                    f"adapter's samples with glora.activate."
                )
            return parts[0]

        leaves, structures = zip(*map(tree_flatten, results), strict=True)
        if any(structure != structures[0] for structure in structures):
            raise RuntimeError(f"Inside glora.route {path!r} gives results of different structure for each adapter.")
        joined = [join(at, *parts) for at, parts in enumerate(zip(*leaves, strict=True))]
        return tree_unflatten(joined, structures[0])


def _place_of(name: str, value: Any, module: nn.Module, layout: Layout, rows: int) -> tuple[int, int | None]:
    """How many rows each sample has in a named argument, and in which dimension the batch is; None: in none."""
    if name == "attn_mask" and isinstance(module, nn.MultiheadAttention) and isinstance(value, Tensor):
        return cast("Any", module).num_heads, 0 if value.ndim == 3 else None
    return rows, layout.arguments.get(name, layout.dim)


def _is_batched(store: Store) -> bool:
    return isinstance(store, Weight) and store.matrix.is_batched


def _rows_of(samples: Tensor, each: int) -> Tensor:
    """The indices of these samples' rows."""
    return samples if each == 1 else (samples.unsqueeze(1) * each + torch.arange(each)).flatten()


def _checkpoint_frames() -> int:
    """How many calls of torch's activation checkpointing are running in this thread."""
    count, frame = 0, sys._getframe()
    while frame is not None:
        count += frame.f_code.co_filename == torch.utils.checkpoint.__file__
        frame = frame.f_back
    return count
