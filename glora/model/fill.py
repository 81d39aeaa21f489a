"""An adapter's file written into the same adapter of a sharded model, where nothing can be attached any more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from glora.model.adapters import activate, adapter_tensors, adapters, parameters, zero_created_biases
from glora.model.describe import describe
from glora.model.sharded import reshard
from glora.model.state import load_state_dict
from glora.model.walk import Model, adapted_owners
from glora.spec import AdapterFileError, AdapterSpec, LayerSpec
from glora.tensors import is_sharded
from glora.text import format_problems

# Note [Load after sharding]
# fully_shard divides the parameters that it finds, and takes no new ones: adapters are attached before. A model that is
# larger than a rank is attached on the meta device, sharded, given memory, and only then are there tensors to write
# into. So `glora.load` of a name that a sharded model has writes; of one that it has not, it attaches, and is refused.


def is_filled_by_load(model: nn.Module, name: str) -> bool:
    """Whether the model is sharded and has an adapter of this name (Note [Load after sharding])."""
    if name not in adapters(model):
        return False
    reshard(model)
    return any(is_sharded(tensor) for tensor in adapter_tensors(model, name).values())


def fill_spec(model: Model, spec: AdapterSpec, source: object, name: str, *, trainable: bool) -> Model:
    """Write a described adapter into the adapter of this name, part by part, and let it alone act.

    Raises:
        AdapterFileError: the adapter that is attached has other layers, forms, scales or heads; nothing has changed.
        ValueError: its tensors have no memory.
        RuntimeError: inside `glora.merged` or `glora.route`.
    """
    problems = list(_differences(describe(model, name), spec))
    if problems:
        raise AdapterFileError(
            f"A sharded model takes no new adapter, and a file is written into the same one; {source} does not hold "
            f"the adapter {name!r} of this model. Found: {format_problems(problems)}. Attach before fully_shard what "
            f"the file holds: glora.load on the meta device."
        )
    load_state_dict(model, spec.tensors, name)
    zero_created_biases(adapted_owners(model))
    activate(model, name)
    for parameter in parameters(model, name):
        parameter.requires_grad_(trainable and (parameter.is_floating_point() or parameter.is_complex()))
    return model


def _differences(own: AdapterSpec, given: AdapterSpec) -> Iterator[str]:
    for path in {**own.layers, **given.layers}:
        if path not in own.layers or path not in given.layers:
            yield f"{path!r} is adapted in the {'model' if path in own.layers else 'file'} alone"
        elif _function(own.layers[path]) != _function(given.layers[path]):
            yield f"{path!r} is {own.layers[path].config} in the model and {given.layers[path].config} in the file"
    heads = [{path: sorted(names) for path, names in adapter.heads.items()} for adapter in (own, given)]
    if heads[0] != heads[1] or own.ties != given.ties:
        yield f"heads {heads[0]} tied to {dict(own.ties)} in the model, {heads[1]} to {dict(given.ties)} in the file"


def _function(layer: LayerSpec) -> LayerSpec:
    """What of a layer makes another function of the same tensors, or other tensors."""
    config = replace(layer.config, init="identity", rank_dropout=0.0, alpha=layer.config.scaling * layer.config.rank)
    return replace(layer, config=config, matrix=None, batch=layer.batch or ())
