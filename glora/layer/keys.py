"""Plain checkpoints of the base model go into an adapted module as if it had no adapters."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glora.layer.parametrization import biases_of, live_parametrizations, stores_of
from glora.tensors import is_sharded, sharded_like


def adopt_plain_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Let a module that is given the base model's plain keys, and no adapter keys, load them and keep its adapters."""
    own = f"{prefix}parametrizations."
    held = cast("nn.Module", module._modules["parametrizations"]).state_dict(prefix=own, keep_vars=True)
    # torch's set_model_state_dict adds every tensor of the model itself to what it is given.
    if any(key.startswith(own) and value is not held.get(key) for key, value in state_dict.items()):
        return
    adapters, biases = stores_of(module), biases_of(module)
    _share(state_dict, {f"{prefix}{name}": held[f"{own}{name}.original"] for name in adapters})
    plain = [name for name in adapters if f"{prefix}{name}" in state_dict]
    weights = {name: f"{prefix}{store.matrix.weight}" for name, store in biases.items()}
    weights = {name: key for name, key in weights.items() if key in state_dict}
    if not (plain or weights):
        return
    for name, key in weights.items():
        if biases[name].frozen_weight is not None:
            # A clone: with assign=True the layer's weight becomes the given tensor itself, and may be trained.
            state_dict[f"{own}{name}.0.frozen_weight"] = state_dict[key].clone()
    for name in plain:
        state_dict[f"{own}{name}.original"] = state_dict.pop(f"{prefix}{name}")
    created = {name for name, store in biases.items() if store.created}
    demanded = {f"{own}{name}.original" for name in adapters if name not in created}
    for key, tensor in held.items():
        if key not in demanded:
            state_dict.setdefault(key, tensor)


# Note [Plain keys of a sharded model]
# torch's `set_model_state_dict` divides what it is given by the model's own keys. It knows no plain key of an adapted
# module: whole tensors arrive here, on every rank or (`broadcast_from_rank0`) on the first alone, beside the module's
# own tensors or beside nothing. So all ranks come together here for each sharded module, and the first one's count.
def _share(state_dict: dict[str, Any], originals: dict[str, Tensor]) -> None:
    """Give every rank its part of the plain tensors that the first rank has whole; originals: by their plain keys."""
    meshes = [cast("Any", tensor).device_mesh for tensor in originals.values() if is_sharded(tensor)]
    if not meshes:
        return
    given = {key: state_dict[key] for key in originals if key in state_dict and not is_sharded(state_dict[key])}
    known: list[dict[str, Tensor | None]] = [
        {key: None if is_sharded(originals[key]) else value for key, value in given.items()}
    ]
    for group in meshes[0].get_all_groups():
        dist.broadcast_object_list(known, src=dist.get_global_rank(group, 0), group=group)
    for key, value in known[0].items():
        original = originals[key]
        empty = torch.empty(original.shape, dtype=original.dtype, device="cpu") if value is None else value
        state_dict[key] = sharded_like(original, given.get(key, empty), from_first=True)


def drop_upgraded_keys(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, before: set[str], unexpected: list[str]
) -> None:
    """Keep the base's value where the module itself has added a plain key to an old checkpoint (BatchNorm does).

    The upgrade inserts what the module reads, which is the active adapter's value.
    """
    for name, stack in live_parametrizations(module).items():
        if (key := f"{prefix}{name}") in state_dict and key not in before:
            del state_dict[key]
            state_dict.setdefault(f"{prefix}parametrizations.{name}.original", stack.original)
            unexpected[:] = [other for other in unexpected if other != key]
