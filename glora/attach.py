"""Attaching adapters to a model, baking them in, taking them off."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from glora import flags
from glora.adapters import adapters, check_mergeable, only, refuse_stacked, refuse_while_merged, set_strengths
from glora.config import BIAS_PATHS, WEIGHT_PATHS, GLoRAConfig
from glora.layer import adapters_of, original_order, prepare_class, share_class
from glora.parametrization import Adapters, Bias, Head, HeadCopy, Paths, Weight
from glora.planning import Plan, PlannedLayer, plan
from glora.targets import ALL_LINEAR, Selection, Targets, Trainable, listed
from glora.tree import adapted, join, own_tensors

Model = TypeVar("Model", bound=nn.Module)


def apply(
    model: Model,
    targets: Targets = ALL_LINEAR,
    config: GLoRAConfig | None = None,
    *,
    exclude: Selection = (),
    trainable: Trainable = (),
    name: str = "default",
    freeze: bool = True,
) -> Model:
    r"""Attach an adapter to the linear layers of a model, in place, and freeze the rest.

    Each layer computes `y = x W'^T + b'` from then on, with

    $$W' = W_0 + W_0 \ast A + B, \qquad b' = b_0 + b_0 \odot D + E + W_0 C.$$

    `layer.weight` and `layer.bias` read as W' and b'; the frozen W0 and b0 are torch's
    `layer.parametrizations.weight.original` and `.bias.original`. Train `glora.parameters(model)`.

    Args:
        model: any module; nn.Linear and its subclasses in it are adapted.
        targets: which layers. A regex (it must match a layer's whole path), a list of path suffixes (whole dotted
            components, as `["q_proj", "v_proj"]`), a predicate `(path, module) -> bool`, `"all-linear"` (all but a
            model's output embeddings), or a mapping from regex to the config of the layers that it is first to match.
        config: the forms of the paths; `GLoRAConfig()` if None.
        exclude: layers to leave out, in the grammar of `targets`; wins over it.
        trainable: modules that train as a whole beside the adapter (a new head): the same grammar over all modules, or
            the modules themselves; wins over `targets`. The adapter trains copies of their tensors that belong to it.
        name: the adapter's name. A second call with another name adds another adapter; the newest is the only active.
        freeze: freeze every other parameter. `glora.merge` and `glora.remove` give the flags back.

    Returns:
        The model.

    Raises:
        ValueError: a pattern that matches nothing, a layer named in a list or mapping that cannot be adapted, a name
            that is taken, nothing left to train. Nothing has changed then.
        RuntimeError: inside `glora.merged`.

    Warns:
        UserWarning: once for all layers that were swept in by a regex, predicate or "all-linear" and cannot be adapted,
            and once for all whose C, D and E are left out because they have no bias.

    Source: GLoRA, arXiv 2306.07967; the names of the arguments are those of the field.

    Example:
        >>> import torch, glora
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = glora.apply(model, targets=["0"], trainable=["2"])
        >>> [name for name, _ in glora.named_parameters(model)]
        ['0.A.left', '0.A.right', '0.B.left', '0.B.right', '0.C.value', '0.D.value', '0.E.value', '2.weight', '2.bias']
    """
    refuse_while_merged(model)
    planned = plan(model, targets, config, exclude=exclude, trainable=trainable, name=name, freeze=freeze)
    _warn(planned)
    return attach(model, planned, freeze=freeze)


def attach(
    model: Model,
    planned: Plan,
    *,
    freeze: bool,
    values: Mapping[str, Tensor] | None = None,
    trainable: bool = True,
) -> Model:
    """Do what was planned; what can fail, fails before the model changes.

    Args:
        model: the model.
        planned: what goes where.
        freeze: whether the rest is frozen.
        values: what the adapter starts with, by the keys of its state dict; None for what its configs say.
        trainable: whether its tensors ask for gradients.
    """
    # All memory that the adapter takes is taken here.
    parts = [(layer, *_build_parts(layer, initialise=values is None)) for layer in planned.layers]
    heads = [(head.module, {n: HeadCopy(t) for n, t in own_tensors(head.module).items()}) for head in planned.heads]
    classes = [prepare_class(module) for module in (*(row.module for row in planned.layers), *(m for m, _ in heads))]
    if values is not None:
        for layer, *both in parts:
            for part in both:
                if part is not None:
                    _fill(part, {key: values[join(layer.path, key)] for key in part.state_dict()})
        for head, (_, copies) in zip(planned.heads, heads, strict=True):
            for tensor_name, copy in copies.items():
                _fill(copy, {"value": values[join(head.path, tensor_name)]})
    if not trainable:
        for part in (
            *(part for _, *both in parts for part in both),
            *(c for _, copies in heads for c in copies.values()),
        ):
            if part is not None:
                part.requires_grad_(False)
    name = planned.name
    if freeze:
        flags.freeze(model)
    else:  # the copies train in their place
        flags.freeze(model, only=[module for module, _ in heads])
    for layer, weight, bias in parts:
        if layer.creates_bias and "bias" not in own_tensors(layer.module):
            original = own_tensors(layer.module)["weight"]
            # With what is loaded (see _fill), and so not where there is no memory.
            device = "cpu" if original.is_meta and values is not None else original.device
            zeros = original.new_zeros(original.shape[0], device=device)
            layer.module.bias = nn.Parameter(zeros, requires_grad=False)
        for tensor_name, part, kind in (("weight", weight, Weight), ("bias", bias, Bias)):
            if part is not None:
                store = _store(layer.module, tensor_name, kind)
                store.attach(name, part)
                if layer.creates_bias and isinstance(store, Bias):
                    store.created = True
    for module, copies in heads:
        for tensor_name, head_copy in copies.items():
            _store(module, tensor_name, Head).attach(name, head_copy)
    set_strengths(model, {name: 1.0})
    del classes  # until here they had no instance to keep them
    return model


def _build_parts(layer: PlannedLayer, *, initialise: bool) -> tuple[Paths | None, Paths | None]:
    """The layer's paths on its weight and on its bias; None where there is none."""
    weight = own_tensors(layer.module)["weight"]
    parts: list[Paths | None] = []
    for names in (WEIGHT_PATHS, BIAS_PATHS):
        kept = tuple(path for path in names if path in layer.paths)
        part = Paths(layer.config, kept, weight) if kept else None
        if part is not None and initialise:
            part.reset_parameters(weight)
        parts.append(part)
    return parts[0], parts[1]


def _fill(part: nn.Module, values: Mapping[str, Tensor]) -> None:
    if any(tensor.is_meta for tensor in part.state_dict().values()):
        # The base has no memory yet; what is loaded must not be lost with it, and waits where it was read.
        part.to_empty(device="cpu")
    with torch.no_grad():
        for key, tensor in part.state_dict().items():
            tensor.copy_(values[key])


def _store(module: nn.Module, name: str, kind: type[Adapters]) -> Adapters:
    """The module's adapters on a tensor, registered with torch if there are none yet."""
    store = adapters_of(module).get(name)
    if store is None:
        order = original_order(module)
        store = kind()
        # unsafe: torch would otherwise compute the tensor once, to check a dtype that we know.
        parametrize.register_parametrization(module, name, store, unsafe=True)
        share_class(module, order)
    return store


def _warn(planned: Plan) -> None:
    unfit = [row for row in planned.skipped if row.unfit]
    if unfit:
        reasons = "; ".join(f"{row.path!r}: {row.reason}" for row in unfit[:5])
        more = f"; and {len(unfit) - 5} more" if len(unfit) > 5 else ""
        warnings.warn(
            f"{len(unfit)} of the layers that targets= sweeps in cannot be adapted and are left as they are ({reasons}"
            f"{more}). glora.plan lists all; exclude= silences this.",
            UserWarning,
            stacklevel=3,
        )
    if planned.without_bias:
        warnings.warn(
            f"{len(planned.without_bias)} layers have no bias, and paths C, D and E are left out there "
            f"({listed(planned.without_bias)}). create_bias=True in the config would give them one for C and E; "
            f"C='none', D='none', E='none' silences this.",
            UserWarning,
            stacklevel=3,
        )


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
    refuse_while_merged(model)
    name = only(model, name)
    refuse_stacked(model)
    strengths = {other: weight for other, weight in adapters(model).items() if other != name}
    if not strengths:
        return remove(model)
    for found, stores in list(adapted(model)):
        for tensor_name, store in sorted(stores.items()):
            store.detach(name)
            if not any(True for _ in store.parts()):
                _take_off(found.module, tensor_name, leave_parametrized=False)
    set_strengths(model, strengths)
    return model


def merge(model: Model) -> Model:
    """Bake the active adapters in: plain layers again, with W' and b' for weights and no cost at inference.

    The same as torch's `parametrize.remove_parametrizations` on every adapted tensor, after a check of all of them.
    Parameters keep their identity, keys and order; `requires_grad` is as before the first `apply`, unless changed by
    hand since. Heads keep the active adapter's tensors. A model without adapters is left as it is.

    Args:
        model: the model, or a part of it.

    Returns:
        The model.

    Raises:
        ValueError: a W' or b' that is not finite after its rounding. Nothing has changed then.
        RuntimeError: inside `glora.merged`, or another parametrization stacked on an adapter.

    Warns:
        UserWarning: inactive adapters, which are dropped.

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
    refuse_while_merged(model)
    check_mergeable(model)
    dropped = [name for name, weight in adapters(model).items() if weight == 0]
    if dropped:  # before anything changes: a warning may be an error
        warnings.warn(
            f"merge bakes in the active adapters alone; dropped: {', '.join(map(repr, dropped))}. Save them first, or "
            f"use glora.merged(model), which gives everything back.",
            UserWarning,
            stacklevel=2,
        )
    with torch.inference_mode(False), torch.no_grad():
        for found, stores in list(adapted(model)):
            # The bias first, while the weight's original is still W0.
            for name in sorted(stores):
                unused = isinstance(stores[name], Bias) and not stores[name].active
                _take_off(found.module, name, leave_parametrized=not unused)
    flags.restore(model)
    return model


def remove(model: Model) -> Model:
    """Take all adapters off: the very W0 and b0 again (never recomputed), the base model's heads, and no created bias.

    Args:
        model: the model, or a part of it.

    Returns:
        The model; `requires_grad` is as before the first `apply`, unless changed by hand since.

    Raises:
        RuntimeError: inside `glora.merged`, or another parametrization stacked on an adapter.

    Example:
        >>> import torch, glora
        >>> layer = torch.nn.Linear(4, 2)
        >>> glora.remove(glora.apply(layer)) is layer
        True
    """
    refuse_while_merged(model)
    refuse_stacked(model)
    for found, stores in list(adapted(model)):
        for name in sorted(stores):
            _take_off(found.module, name, leave_parametrized=False)
    flags.restore(model)
    return model


def _take_off(module: nn.Module, name: str, *, leave_parametrized: bool) -> None:
    store = adapters_of(module)[name]
    parametrize.remove_parametrizations(module, name, leave_parametrized=leave_parametrized)
    if isinstance(store, Bias) and store.created and not leave_parametrized:
        module.register_parameter("bias", None)
