"""A described adapter in the place of one that a model has: hot swap."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from glora.config import BIAS_PATHS, WEIGHT_PATHS, GLoRAConfig
from glora.layer.heads import HeadCopy, SharedCopy
from glora.layer.parametrization import Bias, Paths, Weight
from glora.model import flags
from glora.model.adapters import resolve_name, set_adapter_weights
from glora.model.attach import attach, other_base
from glora.model.change import change, refuse_stacked, refuse_while_swapped, walk_to_read
from glora.model.merge import drop
from glora.model.plan import plan_spec
from glora.model.records import Plan, PlannedLayer
from glora.model.state import padded
from glora.model.walk import Model, Owner, owners
from glora.spec import AdapterSpec, join, report_other_base
from glora.tensors import write_into

# Note [Hot swap]
# A server keeps a model, its compiled graphs and its optimizers, and puts one adapter after another into it. Where the
# layers, forms and heads are the same, the numbers are written into the Parameters that are there: nothing is compiled
# again, and nobody who holds a Parameter is left behind. A lower rank is padded with components of zeros, which stay
# zeros in training (the gradient of either factor is a product with the other); the config is the file's, and
# `describe` leaves the padding out. What trained the padding after all (the momentum of an earlier adapter, a start
# anew) is no padding any more: the adapter is then described at the whole rank.
#
# Everything else is dropped, and attached anew, in one change.


def refill(
    model: Model, spec: AdapterSpec, source: object, name: str, *, trainable: bool = True, strict: bool = False
) -> Model:
    """Put a described adapter in the place of the one of this name (Note [Hot swap]); see `attach_spec`.

    Raises:
        KeyError: no adapter of that name.
        AdapterFileError: as `attach_spec`; nothing has changed.
        RuntimeError: inside `glora.merged` or `glora.route`; another parametrization stacked on an adapter; where it
            must be dropped, as `glora.delete`.
    """
    refuse_while_swapped(model)
    walk = walk_to_read(model)
    refuse_stacked(walk)
    planned = plan_spec(walk, spec, source, resolve_name(walk, name), replaces=True)
    report_other_base(other_base(walk, planned, spec), source, strict=strict, stacklevel=3)
    places = _places(walk, planned)
    with change(model, taking_off=places is None, reversible=places is None) as walk, torch.no_grad():
        if places is None:
            drop(walk, name)
            walk = owners(model)
            attach(walk, plan_spec(walk, spec, source, name), values=spec.tensors, trainable=trainable)
            return model
        held = {place.key: place.tensor for place in places}
        statistics = {join(head.path, n): head.owner.tensors[n] for head in planned.statistics for n in head.names}
        for key, value in padded(statistics | dict(spec.tensors), held).items():
            write_into(held[key], value)
        for part, config in {(place.part, place.config) for place in places}:
            if isinstance(part, Paths):
                part.take(cast("GLoRAConfig", config))
        flags.freeze(walk, whole_model=True)
        set_adapter_weights(walk, {name: 1.0})
        for tensor in held.values():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad = trainable and (tensor.is_floating_point() or tensor.is_complex())
    return model


class _Place(NamedTuple):
    """Where one of the described tensors goes.

    Attributes:
        config: what its layer is described as; None for a head's.
    """

    key: str
    tensor: Tensor
    part: nn.Module
    config: GLoRAConfig | None = None


def _places(walk: Iterable[Owner], planned: Plan) -> list[_Place] | None:
    """A place for each tensor in the adapter that is there; None where it is another."""
    there = {
        (id(owner.module), tensor): store.parts()[planned.name]
        for owner in walk
        for tensor, store in owner.stores.items()
        if planned.name in store.parts()
    }
    places: list[_Place] = []
    for layer in planned.layers:
        for tensor, paths in ((layer.site.matrix.weight, WEIGHT_PATHS), (layer.site.matrix.bias or "", BIAS_PATHS)):
            kept = {path for path in paths if path in layer.paths}
            if not kept:
                continue
            part = there.pop((id(layer.module), tensor), None)
            if not isinstance(part, Paths) or not _takes(part, layer, tensor, kept):
                return None
            places += [_Place(join(layer.path, k), t, part, layer.config) for k, t in part.held().items()]
    for head in (*planned.heads, *planned.statistics):
        for tensor in head.names:
            copy = there.pop((id(head.module), tensor), None)
            others = [there.pop((id(o.module), n), None) for o, n in head.shared.get(tensor, ())]
            if not isinstance(copy, HeadCopy) or not all(
                isinstance(o, SharedCopy) and o.source is copy for o in others
            ):
                return None
            places.append(_Place(join(head.path, tensor), copy.value, copy))
    return None if there or any(place.tensor.is_meta for place in places) else places


def _takes(part: Paths, layer: PlannedLayer, tensor: str, kept: set[str]) -> bool:
    """Whether paths that are there are of the described kind, and of its rank at least."""
    store = cast("Weight | Bias", layer.site.owner.stores[tensor])
    shapes = {key: tuple(value.shape) for key, value in part.held().items()}
    wanted = layer.spec.tensors(sorted(kept))
    same_product = part.config.product == layer.config.product or layer.config.A not in ("lora", "vector")
    return (
        type(part) is Paths  # and no supernet's
        and store.matrix == layer.site.matrix
        and shapes.keys() == wanted.keys()
        and (same_product or "A" not in kept)
        and all(_fits(shapes[key], cast("tuple[int, ...]", spec.shape), key) for key, spec in wanted.items())
    )


def _fits(held: tuple[int, ...], shape: tuple[int, ...], key: str) -> bool:
    """Whether a tensor has the shape, or a higher rank."""
    axis = {"left": -1, "right": -2}.get(key.rpartition(".")[2])
    if axis is None or len(held) != len(shape):
        return held == shape
    rank = held[axis]
    return shape[axis] <= rank and held == (*shape[:axis], rank, *shape[axis:][1:])
