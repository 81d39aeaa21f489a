"""Named adapters: which there are, which act, and their tensors."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from glora.functional import ONE
from glora.layer.heads import Head, HeadCopy, SharedCopy
from glora.layer.parametrization import DISABLED, AdapterWeights, Bias, Paths, Weight, stores_of
from glora.model import flags
from glora.model.change import change, refuse_while_merged
from glora.model.replaced import warn_of_replaced
from glora.model.walk import Model, Owner, adapted_owners, owners
from glora.precision import wide
from glora.spec import join
from glora.text import UnknownName, brief, choice, quote_names
from glora.undo import block, undone


def adapters(model: nn.Module) -> dict[str, float]:
    """The model's adapters with their weights, in the order of the layers that they are on; 0.0 for an inactive one.

    Example:
        >>> import torch, glora
        >>> layer = glora.apply(torch.nn.Linear(4, 2), name="a")
        >>> glora.adapters(glora.apply(layer, name="b"))
        {'a': 0.0, 'b': 1.0}
    """
    return adapter_weights_of(adapted_owners(model))


def adapter_weights_of(walk: Iterable[Owner]) -> dict[str, float]:
    """Adapter name to weight, as `adapters` gives them."""
    weights: dict[str, float] = {}
    for owner in walk:
        for store in owner.stores.values():
            adapter_weights = store.acting.adapter_weights
            for name in store.parts():
                weights[name] = weights.get(name) or (adapter_weights[name].item() if name in adapter_weights else 0.0)
    return weights


def activate(model: Model, weights: str | Mapping[str, float]) -> Model:
    """Let one adapter act, or several with weights: `W0 + sum_i w_i (W0 * A_i + B_i)`, and likewise for the bias.

    Args:
        model: the model.
        weights: an adapter's name (weight 1), or name to weight; those not named, and those of weight 0, do not act.
            `{}` is the base model. A layer without the named adapters runs as the base's. Heads of adapters that act
            together must be equal, and do not train while they do.

    This changes the model for every thread; a forward pass of a layer that is under way keeps to what acted before. So
    does a backward pass that is pending: each term of a loss trains the adapters that its forward ran with, activation
    checkpoints included (but for some that Note [Checkpoints] names). `glora.route` takes several adapters through one
    forward.

    Returns:
        The model. Factors of adapters that do not act ask for no gradient, but for one that is pending.

    Raises:
        KeyError: a name that is not an adapter of the model.
        ValueError: a weight that is no finite number; several adapters with heads or running statistics that differ.
        RuntimeError: inside `glora.merged` or `glora.route`.

    Example:
        >>> import torch, glora
        >>> layer = glora.apply(glora.apply(torch.nn.Linear(4, 2), name="a"), name="b")
        >>> glora.adapters(glora.activate(layer, {"a": 0.7, "b": 0.3}))
        {'a': 0.7, 'b': 0.3}
        >>> glora.adapters(glora.activate(layer, "a"))
        {'a': 1.0, 'b': 0.0}
    """
    weights = {weights: 1.0} if isinstance(weights, str) else weights
    with change(model) as walk:
        check_weights(walk, weights)
        set_adapter_weights(walk, weights)
    return model


def check_weights(walk: Iterable[Owner], weights: Mapping[str, float]) -> list[str]:
    """The adapters that act under these weights, which are checked as `activate` says, heads included."""
    if not isinstance(weights, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"weights must be an adapter's name, or a mapping from name to weight; found {brief(weights)}. Adapters "
            f"that act together are {{'a': 0.7, 'b': 0.3}}; the base model is {{}}."
        )
    known = adapter_weights_of(walk)
    for name, weight in weights.items():
        _check_known(name, known)
        if type(weight) not in (int, float) or not -1e300 < weight < 1e300:
            raise ValueError(f"An adapter's weight must be a finite number; found {weight!r} for {name!r}.")
    active = [name for name, weight in weights.items() if weight != 0]
    if len(active) > 1:
        _check_heads_agree(walk, active)
    return active


def _check_known(name: str, known: Collection[str]) -> None:
    if name not in known:
        raise UnknownName(f"{name!r} is not an adapter of the model, which has {quote_names(known)}. {choice(known)}")


def _check_heads_agree(walk: Iterable[Owner], active: list[str]) -> None:
    """Raise ValueError where adapters that are to act together have heads of their own."""
    for owner in walk:
        for tensor_name, store in owner.stores.items():
            if not isinstance(store, Head):
                continue
            original, parts = owner.tensors[tensor_name], store.parts()
            key = join(owner.path, tensor_name)
            copies = [cast("HeadCopy | SharedCopy | None", parts.get(name)) for name in active]
            first, *others = [original if copy is None else copy.value for copy in copies]
            if not all(torch.equal(wide(first), wide(other)) for other in others):
                what, remedy = "Heads", "combine adapters without a trainable= head"
                if not isinstance(original, nn.Parameter):
                    what, remedy = "Running statistics", "train the adapters with such modules in eval mode"
                raise ValueError(
                    f"{what} do not add up: adapters that act together must have equal ones, and {key!r} differs "
                    f"between {quote_names(active)}. Activate one of them, or {remedy}."
                )


def set_adapter_weights(walk: Iterable[Owner], weights: Mapping[str, float]) -> None:
    """Let exactly these adapters act, everywhere in the model; nothing is checked."""
    tensors = {
        name: ONE if weight == 1 else torch.tensor(weight, dtype=torch.float64, device="cpu")
        for name, weight in weights.items()
        if weight != 0
    }
    for owner in walk:
        set_acting(owner, tensors)


def set_acting(owner: Owner, adapter_weights: AdapterWeights) -> None:
    """Let these adapters act, as far as the module has them; `requires_grad` follows."""
    stores = list(stores_of(owner.module).values())
    if stores:
        names = {name for store in stores for name in store.parts()}
        acting = {name: weight for name, weight in adapter_weights.items() if name in names}
        stores[0].acting.adapter_weights = acting
    for store in stores:
        flags.follow_activity(store)


@block
def disabled(model: Model) -> Generator[Model]:
    """Run the model as the base model, to the bit, inside the `with` block; inside of a route too, and around one.

    Factors keep their `requires_grad` flags, so that a pending backward still reaches them. What was active acts again
    afterwards, whatever happened inside. This changes the model for every thread.

    Yields:
        The model.

    Raises:
        RuntimeError: inside `glora.merged`.

    Example:
        >>> import torch, glora
        >>> layer, x = torch.nn.Linear(4, 2), torch.randn(3, 4)
        >>> before = layer(x)
        >>> with glora.disabled(glora.apply(layer, config=glora.GLoRAConfig(init="random"))) as base:
        ...     torch.equal(base(x), before)
        True
    """
    refuse_while_merged(model)
    everything = owners(model)
    warn_of_replaced(everything)
    walk = [owner for owner in everything if owner.stores]
    before = {owner.acting: owner.acting.adapter_weights for owner in walk}

    def act_again() -> None:
        for acting, adapter_weights in before.items():
            acting.adapter_weights = adapter_weights
        # The model is walked again: adapters may have come and gone inside.
        for owner in adapted_owners(model):
            set_acting(owner, before.get(owner.acting, {}))
            if before.get(owner.acting) is DISABLED:
                owner.acting.adapter_weights = DISABLED

    with undone(act_again):
        for acting in before:
            acting.adapter_weights = DISABLED
        yield model


def resolve_name(walk: Iterable[Owner], name: str | None) -> str:
    """The name itself, or that of the only adapter where it is None."""
    known = adapter_weights_of(walk)
    if name is not None:
        _check_known(name, known)
        return name
    if len(known) != 1:
        remedy = "Pass one of them as name=." if known else choice(known)
        raise ValueError(f"name=None means the only adapter; the model has {quote_names(known)}. {remedy}")
    return next(iter(known))


def adapter_tensors(walk: Iterable[Owner], name: str) -> dict[str, Tensor]:
    """Key to tensor of one adapter: `<module path>.<path>.<factor>`, and `<module path>.<tensor>` for heads."""
    tensors: dict[str, Tensor] = {}
    for owner in walk:
        for tensor_name, store in owner.stores.items():
            part = store.parts().get(name)
            if isinstance(part, Paths):
                prefix = join(cast("Weight | Bias", store).matrix.path(owner.path), "")
                tensors |= {prefix + key: tensor for key, tensor in part.held().items()}
            elif isinstance(part, HeadCopy):
                tensors[join(owner.path, tensor_name)] = part.value
    return tensors


def named_parameters(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """The trainable parameters of an adapter, heads included, with the keys of `glora.state_dict`.

    Args:
        model: the model.
        name: the adapter; None for the only one.

    Raises:
        KeyError: no adapter of that name.
        ValueError: no `name`, and not exactly one adapter.

    Example:
        >>> import torch, glora
        >>> layer = glora.apply(torch.nn.Linear(4, 2), config=glora.GLoRAConfig.lora(rank=1))
        >>> {name: tuple(parameter.shape) for name, parameter in glora.named_parameters(layer)}
        {'B.left': (2, 1), 'B.right': (1, 4)}
    """
    walk = adapted_owners(model)
    items = adapter_tensors(walk, resolve_name(walk, name)).items()
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
        ValueError: no `name`, and not exactly one adapter.
        RuntimeError: inside `glora.merged` or `glora.route`.

    Example:
        >>> import torch, glora
        >>> with torch.device("meta"):
        ...     layer = glora.apply(torch.nn.Linear(4, 2))
        >>> layer = layer.to_empty(device="cpu")
        >>> _ = glora.reset_parameters(layer)
        >>> layer.parametrizations.weight[0].default.B.left.abs().sum().item()
        0.0
    """
    with change(model, reversible=False) as walk:
        name = resolve_name(walk, name)
        zero_created_biases(walk)
        for owner in walk:
            for tensor_name, store in owner.stores.items():
                part = store.parts().get(name)
                if isinstance(part, Paths):
                    matrix = cast("Weight | Bias", store).matrix
                    part.reset_parameters(matrix.read(owner.tensors[matrix.weight]))
                elif isinstance(part, HeadCopy):
                    part.reset_parameters(owner.tensors[tensor_name])
    return model


@torch.no_grad()
def zero_created_biases(walk: Iterable[Owner]) -> None:
    """Make created biases zeros again: `to_empty` leaves anything in them, and no file holds them."""
    for owner in walk:
        for tensor_name, store in owner.stores.items():
            if isinstance(store, Bias) and store.created:
                owner.tensors[tensor_name].zero_()
