"""Attaching an adapter: what was planned is built, filled, and then registered all at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glora.config import BIAS_PATHS, WEIGHT_PATHS, GLoRAConfig
from glora.layer.adapted import adapted_class, register
from glora.layer.heads import Head, HeadCopy
from glora.layer.parametrization import Adapters, Bias, Paths, Weight, adapters_of
from glora.model import freezing
from glora.model.adapters import set_scales
from glora.model.modules import Model, NamedModule, all_or_nothing, named_modules
from glora.model.plan import plan, plan_spec
from glora.model.planned import Plan, PlannedLayer
from glora.model.targets import ALL_LINEAR, Selection, Targets, Trainable
from glora.spec import AdapterSpec, join
from glora.text import format_names, format_problems


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
        RuntimeError: inside `glora.merged` or `glora.route`.

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
    planned = plan(model, targets, config, exclude=exclude, trainable=trainable, name=name, freeze=freeze)
    warn_of(planned)
    return attach(model, planned, freeze=freeze)


def attach_spec(
    model: Model, spec: AdapterSpec, source: object, *, name: str = "default", trainable: bool = True
) -> Model:
    """Attach a described adapter and fill it with its tensors; see `plan_spec` for what is checked, and raised.

    Args:
        model: the model; other adapters may be there, and stay, inactive.
        spec: what to attach.
        source: the file that it came from, for messages.
        name: its name in the model.
        trainable: whether its tensors, heads included, ask for gradients.

    Returns:
        The model, with the adapter the only active one and the rest frozen.
    """
    return attach(model, plan_spec(model, spec, source, name), values=spec.tensors, trainable=trainable)


def _plain_paths(layer: PlannedLayer, names: tuple[str, ...], weight: Tensor) -> Paths:
    return Paths(layer.config, names, weight)


def attach(
    model: Model,
    planned: Plan,
    *,
    freeze: bool = True,
    values: Mapping[str, Tensor] | None = None,
    trainable: bool = True,
    build: Callable[[PlannedLayer, tuple[str, ...], Tensor], Paths] = _plain_paths,
) -> Model:
    """Do what was planned, or nothing (Note [All or nothing]).

    Args:
        model: the model.
        planned: what goes where.
        freeze: whether the rest is frozen.
        values: what the adapter starts with, by the keys of its state dict; None for what its configs say.
        trainable: whether its tensors ask for gradients.
        build: makes a layer's paths on one of its tensors, from their names and the layer's frozen weight.
    """
    with all_or_nothing(model):
        parts = _build(planned, values, build)
        # The registry of classes is weak: this list holds them until a module uses them.
        classes = [adapted_class(part.named.module) for part in parts]
        for part in parts:
            if not trainable:
                part.content.requires_grad_(False)
        # Without freezing the rest, a head's copies train in its place.
        freezing.freeze(named_modules(model) if freeze else [head.named for head in planned.heads], whole=freeze)
        for part in parts:
            _register(part, planned.name)
        set_scales(model, {planned.name: 1.0})
        del classes
    return model


@dataclass(frozen=True)
class _Part:
    """What goes onto the tensor `name` of a module.

    Attributes:
        kind: the adapters that it joins.
        created: zeros for a bias that the layer does not have; None where the tensor is there.
    """

    named: NamedModule
    name: str
    kind: type[Adapters]
    content: Paths | HeadCopy
    created: Tensor | None = None


def _build(
    planned: Plan,
    values: Mapping[str, Tensor] | None,
    build: Callable[[PlannedLayer, tuple[str, ...], Tensor], Paths],
) -> list[_Part]:
    """All tensors that the adapter needs, filled: all memory that it takes is taken here."""
    parts: list[_Part] = []
    for layer in planned.layers:
        prefix = join(layer.path, "")
        weight = layer.named.tensors["weight"]
        for tensor_name, kind, names in (("weight", Weight, WEIGHT_PATHS), ("bias", Bias, BIAS_PATHS)):
            kept = tuple([path for path in names if path in layer.paths])
            if not kept:
                continue
            paths, created = build(layer, kept, weight), None
            if values is None:
                paths.reset_parameters(weight)
            else:
                _fill(paths, {key: values[prefix + key] for key in paths.state_dict()})
            if kind is Bias and layer.creates_bias:
                # Allocate on the CPU when loading onto the meta device, beside what is loaded (see _fill).
                device = "cpu" if weight.is_meta and values is not None else weight.device
                created = torch.zeros(weight.shape[0], dtype=weight.dtype, device=device)
            parts.append(_Part(layer.named, tensor_name, kind, paths, created))
    for head in planned.heads:
        for tensor_name, original in head.named.tensors.items():
            copy = HeadCopy(original)
            if values is not None:
                _fill(copy, {"value": values[join(head.path, tensor_name)]})
            parts.append(_Part(head.named, tensor_name, Head, copy))
    return parts


@torch.no_grad()
def _fill(content: nn.Module, values: Mapping[str, Tensor]) -> None:
    own = content.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        # Keep loaded values on the CPU until the model has memory.
        content.to_empty(device="cpu")
        own = content.state_dict()
    for key, tensor in own.items():
        tensor.copy_(values[key])


def _register(part: _Part, name: str) -> None:
    """Put a part beside the other adapters' on its tensor, or first."""
    module = part.named.module
    stores = adapters_of(module)
    store = stores.get(part.name)
    if store is not None:
        store.add_module(name, part.content)
        return
    store = part.kind(next(iter(stores.values())).acting if stores else None)
    if isinstance(store, Bias) and part.created is not None:
        store.created = True
        module._parameters[part.name] = nn.Parameter(part.created, requires_grad=False)
    store.add_module(name, part.content)
    register(module, part.name, store)


def warn_of(planned: Plan) -> None:
    """Warn the caller of the caller of what a plan leaves out."""
    unsupported = [f"{row.path!r}: {row.reason}" for row in planned.skipped if row.unsupported]
    if unsupported:
        warnings.warn(
            f"{len(unsupported)} of the layers that targets= sweeps in cannot be adapted and are left as they are "
            f"({format_problems(unsupported)}). glora.plan lists all; exclude= silences this.",
            UserWarning,
            stacklevel=3,
        )
    if planned.without_bias:
        warnings.warn(
            f"{len(planned.without_bias)} layers have no bias, and paths C, D and E are left out there "
            f"({format_names(planned.without_bias)}). create_bias=True in the config would give them one for C and E; "
            f"C='none', D='none', E='none' silences this.",
            UserWarning,
            stacklevel=3,
        )
