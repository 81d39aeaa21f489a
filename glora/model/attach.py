"""Attaching an adapter: what was planned is built, filled, and then registered all at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glora.config import BIAS_PATHS, WEIGHT_PATHS, GLoRAConfig
from glora.fingerprint import Fingerprint, agrees, end_of
from glora.layer.adapted import adapted_class
from glora.layer.heads import Head, HeadCopy, SharedCopy
from glora.layer.parametrization import Acting, Bias, Paths, Store, Weight, stores_of
from glora.layer.registration import register
from glora.model import flags
from glora.model.adapters import set_adapter_weights
from glora.model.change import change
from glora.model.guards import guard, refuse_bypassed
from glora.model.huggingface import (
    guard_save_pretrained,
    warn_of_adapted_heads,
    warn_of_new_modules,
    warn_of_wrapped,
)
from glora.model.plan import plan_spec, plan_targets
from glora.model.records import Plan, PlannedLayer
from glora.model.replaced import remember
from glora.model.statistics import note_buffers
from glora.model.targets import ALL_LINEAR, Selection, Targets, Trainable
from glora.model.walk import Model, Owner
from glora.spec import AdapterSpec, join, report_other_base
from glora.tensors import replicated_like, write_into
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
    r"""Attach an adapter to the layers of a model, in place, and freeze the rest.

    Each layer computes `y = x W'^T + b'` from then on, with

    $$W' = W_0 + W_0 \ast A + B, \qquad b' = b_0 + b_0 \odot D + E + W_0 C.$$

    `layer.weight` and `layer.bias` read as W' and b'; the frozen W0 and b0 are torch's
    `layer.parametrizations.weight.original` and `.bias.original`. Train `glora.parameters(model)`. W' and b' are
    computed at each reading: what is written into them (`layer.weight.data.add_(1)`, `nn.init.zeros_(layer.weight)`) is
    lost, and nothing can notice it.

    Args:
        model: any module. nn.Linear and its subclasses in it are adapted, transformers' Conv1D, `in_proj_weight` of
            nn.MultiheadAttention, fused experts (three-dimensional parameters such as `gate_up_proj`: factors for each
            expert), convolutions, embeddings (rows are looked up; no C, D, E), and what `glora.register_matrix` has
            taught.
        targets: which layers. A regex (it must match a layer's whole path), a list of path suffixes (whole dotted
            components, as `["q_proj", "v_proj"]`), a predicate `(path, module) -> bool`, `"all-linear"` (all but a
            model's embeddings, convolutions and what was registered), or a mapping from regex to the config of
            the layers that it is first to match. A list reaches embeddings too, and so does a regex that matches
            nothing else; a predicate does not see them. A matrix that is not called `weight` has its own path,
            `experts.gate_up_proj`.
        config: the forms of the paths; `GLoRAConfig()` if None, which is LoRA of rank 8.
        exclude: layers to leave out, in the grammar of `targets`; wins over it.
        trainable: modules that train as a whole beside the adapter (a new head): the same grammar over all modules, the
            modules themselves, or `"auto"`, what a task class of transformers has beside its backbone (a classifier
            and what else is new to the model). Wins over `targets`. The adapter trains copies of their tensors that
            belong to it; modules that are tied to them (an output layer to its embedding) read the same copy.
        name: the adapter's name. A second call with another name adds another adapter; the newest is the only active.
        freeze: freeze every other parameter, at once: a graph of the plain model that is pending gives it no gradient.
            `glora.merge` and `glora.remove` give the flags back.

    Returns:
        The model.

    Raises:
        ValueError: a pattern that matches nothing, a layer named in a list or mapping that cannot be adapted, a name
            that is taken, nothing left to train. Nothing has changed then.
        RuntimeError: inside `glora.merged` or `glora.route`.

    Warns:
        UserWarning: once for all layers that were swept in by a regex, predicate or "all-linear" and cannot be adapted,
            once for all whose C, D and E are left out because they have no bias, and once for swept layers that
            are guessed to be a new head (Note [Task heads]); "all-linear" without `exclude` that reaches less than half
            of the model's matrices, with what it leaves out; modules that were in no checkpoint and stay frozen
            (Note [New modules]); factors of PEFT that the targets reach.

    Source: GLoRA, arXiv 2306.07967; the names of the arguments are those of the field.

    Example:
        >>> import torch, glora
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = glora.apply(model, targets=["0"], trainable=["2"])
        >>> [name for name, _ in glora.named_parameters(model)]
        ['0.B.left', '0.B.right', '2.weight', '2.bias']
    """
    with change(model) as walk:
        planned = plan_targets(walk, targets, config, exclude=exclude, trainable=trainable, name=name)
        warn_of(planned, everything=targets == ALL_LINEAR and not exclude)
        warn_of_adapted_heads(walk, planned, targets)
        warn_of_new_modules(walk, planned)
        warn_of_wrapped(walk, planned)
        attach(walk, planned, freeze=freeze)
    return model


def attach_spec(
    model: Model,
    spec: AdapterSpec,
    source: object,
    *,
    name: str = "default",
    trainable: bool = True,
    strict: bool = False,
) -> Model:
    """Attach a described adapter and fill it with its tensors; see `attach_specs`.

    Returns:
        The model, with the adapter the only active one and the rest frozen.
    """
    attach_specs([(model, spec)], source, name=name, trainable=trainable, strict=strict, stacklevel=4)
    return model


def attach_specs(
    adapters: Sequence[tuple[nn.Module, AdapterSpec]],
    source: object,
    *,
    name: str = "default",
    trainable: bool = True,
    strict: bool = False,
    stacklevel: int = 3,
) -> None:
    """Attach a described adapter to each of some models, to all or none; see `plan_spec` for what is raised.

    Args:
        adapters: the models, which have no module in common, and what to attach; other adapters may be there, and stay,
            inactive.
        source: the file that it came from, for messages.
        name: its name in the models.
        trainable: whether its tensors, heads included, ask for gradients.
        strict: whether another base than it was trained beside is an error, or a warning.
        stacklevel: of the warning: who called whoever calls this is 3.
    """
    planned: list[tuple[list[Owner], AdapterSpec, Plan]] = []
    others: list[str] = []

    def go_through(doors: Sequence[tuple[nn.Module, AdapterSpec]]) -> None:
        if not doors:
            report_other_base(others, source, strict=strict, stacklevel=stacklevel + 1 + len(adapters))
            for walk, spec, plan in planned:
                attach(walk, plan, values=spec.tensors, trainable=trainable)
            return
        model, spec = doors[0]
        with change(model) as walk:
            plan = plan_spec(walk, spec, source, name)
            planned.append((walk, spec, plan))
            others.extend(other_base(walk, plan, spec))
            go_through(doors[1:])

    go_through(adapters)


def other_base(walk: list[Owner], planned: Plan, spec: AdapterSpec) -> list[str]:
    """The keys of the frozen tensors that are not those that a described adapter was trained beside."""
    others = [key for layer in planned.layers for key in _other_tensors(layer, spec.base)]
    return [*others, *_others_outside(walk, spec.outside)]


def _other_tensors(layer: PlannedLayer, base: Mapping[str, Fingerprint]) -> list[str]:
    """The keys of a layer's frozen tensors that are not those that the adapter was trained beside."""
    path = layer.site.matrix.module_path(layer.path)
    tensors = {join(path, name): tensor for name, tensor in layer.site.owner.tensors.items()}
    return [key for key, tensor in tensors.items() if key in base and not agrees(tensor, base[key])]


def _others_outside(walk: list[Owner], outside: Mapping[str, Fingerprint]) -> list[str]:
    """The keys of the other frozen parameters that are not what they were, as far as the model has them."""
    held = {join(a, name): tensor for o in walk if outside for a in o.aliases for name, tensor in o.tensors.items()}
    return [key for key, known in outside.items() if key in held and not agrees(end_of(held[key]), known)]


def _build_paths(layer: PlannedLayer, names: tuple[str, ...], weight: Tensor) -> Paths:
    return Paths(layer.config, names, weight)


def attach(
    walk: list[Owner],
    planned: Plan,
    *,
    freeze: bool = True,
    values: Mapping[str, Tensor] | None = None,
    trainable: bool = True,
    build: Callable[[PlannedLayer, tuple[str, ...], Tensor], Paths] = _build_paths,
) -> None:
    """Do what was planned, inside `change`.

    Args:
        walk: the model.
        planned: what goes where.
        freeze: whether the rest is frozen.
        values: what the adapter starts with, by the keys of its state dict; None for what its configs say.
        trainable: whether its tensors ask for gradients.
        build: makes a layer's paths on one of its tensors, from their names and the layer's frozen weight.
    """
    refuse_bypassed(walk, planned)
    parts = _build(planned, values, build)
    # The registry of classes is weak: this list holds them until a module uses them.
    classes = [adapted_class(part.owner.module) for part in parts]
    if not trainable:
        for part in parts:
            part.content.requires_grad_(False)
    # Without freezing the rest, a head's copies train in its place.
    flags.freeze(walk if freeze else [head.owner for head in planned.heads], whole_model=freeze)
    for part in parts:
        _register(part, planned.name)
    set_adapter_weights(walk, {planned.name: 1.0})
    guard_save_pretrained(walk)
    note_buffers(walk)
    guard(walk)
    remember(walk, [part.owner for part in parts])
    del classes


class _Part(NamedTuple):
    """An adapter's part for one tensor of a module, with what makes the store that it goes into.

    Attributes:
        created: the bias that the layer is given for it; None where the tensor is there.
    """

    owner: Owner
    name: str
    content: Paths | HeadCopy | SharedCopy
    make_store: Callable[[Acting | None], Store]
    created: nn.Parameter | None = None


def _build(
    planned: Plan,
    values: Mapping[str, Tensor] | None,
    build: Callable[[PlannedLayer, tuple[str, ...], Tensor], Paths],
) -> list[_Part]:
    """All tensors that the adapter needs, filled: all memory that it takes is taken here."""
    parts: list[_Part] = []
    for layer in planned.layers:
        site, prefix = layer.site, join(layer.path, "")
        weight, matrix, wanted = site.weight, site.matrix, layer.paths
        for name, paths in ((matrix.weight, WEIGHT_PATHS), (matrix.bias, BIAS_PATHS)):
            kept = tuple([path for path in paths if path in wanted])
            if not kept or name is None:
                continue
            content = build(layer, kept, weight)
            if values is None:
                content.reset_parameters(weight)
            else:
                _fill(content, values, prefix)
            if paths == WEIGHT_PATHS:
                parts.append(_Part(site.owner, name, content, partial(Weight, matrix=matrix)))
                continue
            # Zeros on the CPU when loading onto the meta device, beside what is loaded (see _fill).
            device = "cpu" if weight.is_meta and values is not None else weight.device
            created = _created_bias(weight, device) if layer.creates_bias else None
            make_store = partial(Bias, matrix=matrix, created=layer.creates_bias)
            parts.append(_Part(site.owner, name, content, make_store, created))
    for head in (*planned.heads, *planned.statistics):
        for name in head.names:
            copy, key = HeadCopy(head.owner.tensors[name]), join(head.path, name)
            if values is not None and (key in values or head in planned.heads):
                _fill(copy, {"value": values[key]})
            parts.append(_Part(head.owner, name, copy, Head))
            parts += [_Part(owner, shared, SharedCopy(copy), Head) for owner, shared in head.shared.get(name, ())]
    return parts


def _created_bias(weight: Tensor, device: torch.device | str) -> nn.Parameter:
    zeros = torch.zeros(weight.shape[:-1], dtype=weight.dtype, device=device)
    return nn.Parameter(replicated_like(weight, zeros), requires_grad=False)


@torch.no_grad()
def _fill(content: Paths | HeadCopy, values: Mapping[str, Tensor], prefix: str = "") -> None:
    """Write values, whose keys have this prefix, into a part."""
    held = content.held()
    if any(tensor.is_meta for tensor in held.values()):
        held = content.to_empty(device="cpu").held()  # keep loaded values on the CPU until the model has memory
    for key, tensor in held.items():
        write_into(tensor, values[prefix + key])


def _register(part: _Part, adapter: str) -> None:
    """Put a part beside the other adapters' on its tensor, or first."""
    module, stores = part.owner.module, stores_of(part.owner.module)
    store = stores.get(part.name)
    if store is None:
        acting = next(iter(stores.values())).acting if stores else None
        store = part.make_store(acting)
        store.parts()[adapter] = part.content
        if part.created is not None:
            module._parameters[part.name] = part.created
        register(module, part.name, store)
    else:
        store.parts()[adapter] = part.content


def warn_of(planned: Plan, *, everything: bool = False) -> None:
    """Warn of what a plan leaves out, at the line of the user's call; `everything`: all layers were asked for."""
    messages: list[str] = []
    unsupported = [f"{row.path!r}: {row.reason}" for row in planned.skipped if row.unsupported]
    if unsupported:
        messages.append(
            f"{len(unsupported)} of the layers that targets= sweeps in cannot be adapted and are left as they are "
            f"({format_problems(unsupported)}). glora.plan lists all; exclude= silences this."
        )
    if planned.without_bias:
        messages.append(
            f"{len(planned.without_bias)} layers have no bias, and paths C, D and E are left out there "
            f"({format_names(planned.without_bias)}). create_bias=True in the config would give them one for C and E; "
            f"C='none', D='none', E='none' silences this."
        )
    # The default rank costs little anywhere.
    specs = [(layer.path, layer.spec) for layer in planned.layers if layer.spec.config.rank > GLoRAConfig.rank]
    wide = [path for path, s in specs if (s.rank or 0) > max(s.out_features or 0, s.in_features or 0)]
    if wide:
        messages.append(
            f"A product of low rank needs a rank below the sizes of its layer; {len(wide)} layers are smaller than "
            f"their rank both ways, and it gives them nothing but parameters ({format_names(wide)}). Lower rank= there "
            f"(targets= as a mapping has a config for each pattern)."
        )
    if everything and planned.coverage is not None and planned.coverage.share < 0.5:
        share = (
            f"The adapter {planned.coverage}. Convolutions, and modules of a kind that glora.register_matrix teaches, "
            f"are reached when targets= names them; any exclude= silences this."
        )
        messages[-1:] = [f"{messages[-1]} {share}" if messages else share]
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=3)
