"""A plain checkpoint of the base model loads into an adapted module, whose adapters stay as they are."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glora.layer.parametrization import biases_of, live_parametrizations, stores_of
from glora.tensors import is_sharded, sharded_like


def adopt_plain_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Turn the base model's plain keys into the module's, and complete them with its adapters' own tensors.

    A state dict with keys of adapters is left as it is.
    """
    inner = f"{prefix}parametrizations."
    own = cast("nn.Module", module._modules["parametrizations"]).state_dict(prefix=inner, keep_vars=True)
    # torch's set_model_state_dict adds every tensor of the model itself to what it is given.
    if any(key.startswith(inner) and value is not own.get(key) for key, value in state_dict.items()):
        return
    names, biases = list(stores_of(module)), biases_of(module)
    _broadcast_plain(state_dict, {f"{prefix}{name}": own[f"{inner}{name}.original"] for name in names})
    plain = [name for name in names if f"{prefix}{name}" in state_dict]
    # A created bias has no plain key; its weight, which may have no adapter, has one.
    if not plain and not any(f"{prefix}{bias.matrix.weight}" in state_dict for bias in biases.values()):
        return
    for name in plain:
        state_dict[f"{inner}{name}.original"] = state_dict.pop(f"{prefix}{name}")
    created = {name for name, bias in biases.items() if bias.created}
    demanded = {f"{inner}{name}.original" for name in names if name not in created}
    for key, tensor in own.items():
        if key not in demanded:
            state_dict.setdefault(key, tensor)


# Note [Plain keys of a sharded model]
# torch's `set_model_state_dict` shards what it is given by the model's own keys, and does not know the plain keys of an
# adapted module. Whole tensors may arrive on all ranks, or (`broadcast_from_rank0`) on rank 0 only; it broadcasts them.
def _broadcast_plain(state_dict: dict[str, Any], originals: dict[str, Tensor]) -> None:
    """Shard the whole tensors of rank 0 over all ranks; originals: by their plain keys."""
    meshes = [cast("Any", tensor).device_mesh for tensor in originals.values() if is_sharded(tensor)]
    if not meshes:
        return
    whole = {key: state_dict[key] for key in originals if key in state_dict and not is_sharded(state_dict[key])}
    from_first: list[dict[str, Tensor | None]] = [
        {key: None if is_sharded(originals[key]) else value for key, value in whole.items()}
    ]
    for group in meshes[0].get_all_groups():
        dist.broadcast_object_list(from_first, src=dist.get_global_rank(group, 0), group=group)
    for key, value in from_first[0].items():
        original = originals[key]
        empty = torch.empty(original.shape, dtype=original.dtype, device="cpu") if value is None else value
        state_dict[key] = sharded_like(original, whole.get(key, empty), from_first=True)


def drop_upgraded_keys(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, before: set[str], unexpected: list[str]
) -> None:
    """Keep the base's value where the module itself has added a plain key to an old checkpoint (BatchNorm does).

    The module adds the value that it reads, which is the active adapter's.
    """
    for name, parametrization in live_parametrizations(module).items():
        if (key := f"{prefix}{name}") in state_dict and key not in before:
            del state_dict[key]
            state_dict.setdefault(f"{prefix}parametrizations.{name}.original", parametrization.original)
            unexpected[:] = [other for other in unexpected if other != key]
