"""Named adapters: which there are, which act, and running the model without them or merged for a while."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from glora.layer import (
    adapters_of,
    bake_for_a_while,
    base_for_a_while,
    has_shared_class,
    parametrizations_of,
    set_aside,
    unbake,
)
from glora.parametrization import Head, HeadCopy, Paths
from glora.tree import adapted, find, join, own_tensors

Model = TypeVar("Model", bound=nn.Module)


def adapters(model: nn.Module) -> dict[str, float]:
    """The model's adapters with their weights, in the order of attaching; 0.0 for one that is not active.

    Example:
        >>> import torch, glora
        >>> layer = glora.apply(torch.nn.Linear(4, 2), name="a")
        >>> glora.adapters(glora.apply(layer, name="b"))
        {'a': 0.0, 'b': 1.0}
    """
    weights: dict[str, float] = {}
    for _, stores in adapted(model):
        for store in stores.values():
            for name, weight in store.strengths().items():
                weights[name] = weights.get(name) or weight
    return weights


def activate(model: Model, weights: str | Mapping[str, float]) -> Model:
    """Let one adapter act, or several with weights: `W0 + sum_i w_i (W0 * A_i + B_i)`, and likewise for the bias.

    Args:
        model: the model.
        weights: an adapter's name (weight 1), or name to weight; those not named, and those of weight 0, do not act.
            `{}` is the base model. A layer without the named adapters runs as the base's.

    Returns:
        The model. Factors of adapters that do not act ask for no gradient.

    Raises:
        KeyError: a name that is not an adapter of the model.
        ValueError: a weight that is no finite number; several adapters whose heads differ.
        RuntimeError: inside `glora.merged`.

    Example:
        >>> import torch, glora
        >>> layer = glora.apply(glora.apply(torch.nn.Linear(4, 2), name="a"), name="b")
        >>> glora.adapters(glora.activate(layer, {"a": 0.7, "b": 0.3}))
        {'a': 0.7, 'b': 0.3}
        >>> glora.adapters(glora.activate(layer, "a"))
        {'a': 1.0, 'b': 0.0}
    """
    refuse_while_merged(model)
    if not isinstance(weights, (str, Mapping)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"weights must be an adapter's name, or a mapping from name to weight; found {weights!r}.")
    strengths = {weights: 1.0} if isinstance(weights, str) else dict(weights)
    there = adapters(model)
    for name, weight in strengths.items():
        if name not in there:
            raise KeyError(f"{name!r} is not an adapter of the model, which has {_names(there)}.")
        if type(weight) not in (int, float) or not -1e300 < weight < 1e300:
            raise ValueError(f"An adapter's weight must be a finite number; found {weight!r} for {name!r}.")
    active = [name for name, weight in strengths.items() if weight != 0]
    for found, stores in adapted(model):
        for tensor_name, store in stores.items():
            if isinstance(store, Head) and len(active) > 1:
                _check_heads_agree(join(found.path, tensor_name), store, active, own_tensors(found.module)[tensor_name])
    set_strengths(model, strengths)
    return model


def _check_heads_agree(key: str, store: Head, active: list[str], original: Tensor) -> None:
    copies = dict(store.parts())
    first, *others = [cast("HeadCopy", copies[name]).value if name in copies else original for name in active]
    if not all(torch.equal(first, other) for other in others):
        raise ValueError(
            f"Heads do not add up: adapters that act together must have equal ones, and {key!r} differs between "
            f"{_names(active)}. Activate one of them, or combine adapters without a trainable= head."
        )


def set_strengths(model: nn.Module, strengths: Mapping[str, float]) -> None:
    """Let exactly these adapters act, everywhere in the model; nothing is checked."""
    for _, stores in adapted(model):
        for store in stores.values():
            store.activate(strengths)


@contextmanager
def disabled(model: Model) -> Generator[Model]:
    """Run the model as the base model, to the bit, inside the `with` block (inside `glora.merged` too).

    Factors keep their `requires_grad` flags, so that a backward pass through what was computed before the block reaches
    them from inside it. What was active acts again afterwards, whatever happened inside.

    Yields:
        The model.

    Example:
        >>> import torch, glora
        >>> layer, x = torch.nn.Linear(4, 2), torch.randn(3, 4)
        >>> before = layer(x)
        >>> with glora.disabled(glora.apply(layer, config=glora.GLoRAConfig(init="random"))) as base:
        ...     torch.equal(base(x), before)
        True
    """
    carriers = list(adapted(model))
    before = {id(store): (store.active, store.routed) for _, stores in carriers for store in stores.values()}
    with ExitStack() as baked:
        for found, stores in carriers:
            if found.module in set_aside:
                baked.enter_context(base_for_a_while(found.module))
            for store in stores.values():
                store.active, store.routed = {}, None
        try:
            yield model
        finally:
            # The model is walked again: adapters may have come and gone inside.
            for _, stores in adapted(model):
                for store in stores.values():
                    there = {name for name, _ in store.parts()}
                    active, store.routed = before.get(id(store), ({}, None))
                    store.active = {n: s for n, s in active.items() if n in there}
                    store.match_flags()


@contextmanager
def merged(model: Model) -> Generator[Model]:
    """Run the model merged inside the `with` block, as plain layers with W' and b', and give everything back after it.

    W' and b' are other tensors than the frozen ones, which come back as they were: the same objects, the same bits.
    Inside, the model has plain types and keys, and calls that change adapters raise RuntimeError.

    Yields:
        The model.

    Raises:
        ValueError, RuntimeError: as `glora.merge`; nothing has changed then.

    Example:
        >>> import torch, glora
        >>> layer = glora.apply(torch.nn.Linear(4, 2))
        >>> with glora.merged(layer):
        ...     type(layer), list(layer.state_dict())
        (<class 'torch.nn.modules.linear.Linear'>, ['weight', 'bias'])
    """
    check_mergeable(model)
    entered: list[nn.Module] = []
    try:
        with torch.inference_mode(False), torch.no_grad():
            for found, _ in list(adapted(model)):
                if found.module not in set_aside:
                    bake_for_a_while(found.module)
                    entered.append(found.module)
        yield model
    finally:
        for module in entered:
            unbake(module)


def refuse_while_merged(model: nn.Module) -> None:
    """Raise RuntimeError inside `glora.merged` and `glora.route`."""
    for found in find(model):
        if found.module in set_aside:
            raise RuntimeError(
                f"Inside glora.merged the adapters are set aside and cannot be changed (found {found.path!r} merged). "
                f"Leave the `with` block first."
            )
        for store in adapters_of(found.module).values():
            if store.routed is not None:
                raise RuntimeError(
                    f"Inside glora.route each sample has its adapter, and none can be changed (found {store.routed!r} "
                    f"routed). Leave the `with` block first."
                )


def check_mergeable(model: nn.Module) -> None:
    """Raise unless every merged tensor is finite and ours alone to merge; each is computed, looked at and dropped."""
    refuse_stacked(model)
    for found, stores in adapted(model):
        if found.module in set_aside:
            continue
        for name, store in stores.items():
            if isinstance(store, Head) or not store.active:
                continue
            with torch.no_grad():
                value = cast("Tensor", getattr(found.module, name))
            if not value.is_meta and not torch.isfinite(value).all():
                raise ValueError(
                    f"A merged tensor must be finite; `{name}` of {found.path or 'the model itself'!r} has "
                    f"{int((~torch.isfinite(value)).sum())} entries in {value.dtype} that are not. Nothing was merged. "
                    f"Look for an adapter that diverged, lower its weight, or merge a float32 copy of the model."
                )


def refuse_stacked(model: nn.Module) -> None:
    """Raise RuntimeError where a parametrization of somebody else's stands beside or on top of adapters."""
    for found, stores in adapted(model):
        sharded = found.module not in set_aside and not has_shared_class(found.module)
        for name, stack in parametrizations_of(found.module).items():
            if sharded or is_traceable_wrapper_subclass(stack.original):
                raise RuntimeError(
                    f"Only whole, plain layers can be merged or freed of their adapters; `{name}` of {found.path!r} is "
                    f"sharded (a {type(stack.original).__name__}). Do it in a model that is not, with the state dict."
                )
            other = list(stack)[1 if name in stores else 0 :]
            if other:
                raise RuntimeError(
                    f"Adapters must be alone on a layer to be baked in or taken off; `{name}` of {found.path!r} is "
                    f"parametrized by {type(other[0]).__name__} too. Remove that first, or bake all in with "
                    f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})."
                )


def only(model: nn.Module, name: str | None) -> str:
    """The name itself, or that of the only adapter where it is None."""
    there = adapters(model)
    if name is None:
        if len(there) != 1:
            raise ValueError(f"name=None means the only adapter; the model has {_names(there)}. Pass name=.")
        return next(iter(there))
    if name not in there:
        raise KeyError(f"{name!r} is not an adapter of the model, which has {_names(there)}.")
    return name


def tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Key to tensor of one adapter: `<module path>.<path>.<factor>`, and `<module path>.<tensor>` for heads."""
    found_tensors: dict[str, Tensor] = {}
    for found, stores in adapted(model):
        for tensor_name, store in stores.items():
            part = dict(store.parts()).get(name)
            if isinstance(part, Paths):
                found_tensors |= {join(found.path, key): value for key, value in part.named_parameters()}
            elif isinstance(part, HeadCopy):
                found_tensors[join(found.path, tensor_name)] = part.value
    return found_tensors


def named_parameters(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """The trainable parameters of an adapter, heads included, with the keys of `glora.state_dict`.

    Args:
        model: the model.
        name: the adapter; None for the only one.

    Raises:
        KeyError: no adapter of that name.
        ValueError: None, and not exactly one adapter.

    Example:
        >>> import torch, glora
        >>> layer = glora.apply(torch.nn.Linear(4, 2), config=glora.GLoRAConfig.lora(rank=1))
        >>> {name: tuple(parameter.shape) for name, parameter in glora.named_parameters(layer)}
        {'B.left': (2, 1), 'B.right': (1, 4)}
    """
    items = tensors(model, only(model, name)).items()
    return iter([(key, tensor) for key, tensor in items if isinstance(tensor, nn.Parameter)])


def parameters(model: nn.Module, name: str | None = None) -> Iterator[nn.Parameter]:
    """The trainable parameters of an adapter, heads included, for an optimizer; see `named_parameters`.

    Example:
        >>> import torch, glora
        >>> layer = glora.apply(torch.nn.Linear(4, 2))
        >>> optimizer = torch.optim.AdamW(glora.parameters(layer), lr=1e-3)
    """
    return iter([parameter for _, parameter in named_parameters(model, name)])


def reset_parameters(model: Model, name: str | None = None) -> Model:
    """Start an adapter again, as its config says (after `to_empty`, say); heads from the base model's tensors.

    Args:
        model: the model.
        name: the adapter; None for the only one.

    Returns:
        The model.

    Raises:
        KeyError: no adapter of that name.
        ValueError: None, and not exactly one adapter.
        RuntimeError: inside `glora.merged`.

    Example:
        >>> import torch, glora
        >>> with torch.device("meta"):
        ...     layer = glora.apply(torch.nn.Linear(4, 2))
        >>> layer = layer.to_empty(device="cpu")
        >>> _ = glora.reset_parameters(layer)
        >>> layer.parametrizations.weight[0].default.B.left.abs().sum().item()
        0.0
    """
    refuse_while_merged(model)
    name = only(model, name)
    for found, stores in adapted(model):
        originals = own_tensors(found.module)
        for tensor_name, store in stores.items():
            part = dict(store.parts()).get(name)
            if isinstance(part, Paths):
                part.reset_parameters(originals["weight"])
            elif isinstance(part, HeadCopy):
                part.reset_parameters(originals[tensor_name])
            store.invalidate()
    return model


def _names(names: Mapping[str, float] | list[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
