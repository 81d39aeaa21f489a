"""An adapter's file written into the same adapter of a sharded model, where nothing can be attached any more."""

from __future__ import annotations

from torch import nn

from glora.model.adapters import activate, adapter_tensors, adapter_weights_of, parameters, zero_created_biases
from glora.model.change import walk_to_read
from glora.model.state import describe, load_state_dict
from glora.model.walk import Model, adapted_owners
from glora.spec import AdapterFileError, AdapterSpec, differences
from glora.tensors import is_sharded
from glora.text import format_problems

# Note [Load after sharding]
# fully_shard divides the parameters that it finds, and takes no new ones: adapters are attached before. A model that is
# larger than a rank is attached on the meta device, sharded, given memory, and only then are there tensors to write
# into. So `glora.load` of a name that a sharded model has writes; of one that it has not, it attaches, and is refused.


def is_filled_by_load(model: nn.Module, name: str) -> bool:
    """Whether the model is sharded and has an adapter of this name (Note [Load after sharding])."""
    walk = [owner for owner in walk_to_read(model) if owner.stores]
    return name in adapter_weights_of(walk) and any(map(is_sharded, adapter_tensors(walk, name).values()))


def fill_spec(model: Model, spec: AdapterSpec, source: object, name: str, *, trainable: bool) -> Model:
    """Write a described adapter into the adapter of this name, part by part, and let it alone act.

    Raises:
        AdapterFileError: the adapter that is attached has other layers, forms, scales or heads; nothing has changed.
        ValueError: its tensors have no memory.
        RuntimeError: inside `glora.merged` or `glora.route`.
    """
    problems = list(differences(describe(model, name), spec))
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
