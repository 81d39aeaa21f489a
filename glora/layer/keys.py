"""Plain checkpoints of the base model go into an adapted module as if it had no adapters."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from glora.layer.parametrization import adapters_of, biases_of, live_stacks


def adopt_plain_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Let a module that is given the base model's plain keys, and no adapter keys, load them and keep its adapters."""
    own = f"{prefix}parametrizations."
    adapters = adapters_of(module)
    plain = [name for name in adapters if f"{prefix}{name}" in state_dict]
    biases = biases_of(module)
    weights = {name: f"{prefix}{store.matrix.weight}" for name, store in biases.items()}
    weights = {name: key for name, key in weights.items() if key in state_dict}
    if any(key.startswith(own) for key in state_dict) or not (plain or weights):
        return
    for name, key in weights.items():
        if biases[name].frozen_weight is not None:
            # A clone: with assign=True the layer's weight becomes the given tensor itself, and may be trained.
            state_dict[f"{own}{name}.0.frozen_weight"] = state_dict[key].clone()
    for name in plain:
        state_dict[f"{own}{name}.original"] = state_dict.pop(f"{prefix}{name}")
    created = {name for name, store in biases.items() if store.created}
    demanded = {f"{own}{name}.original" for name in adapters if name not in created}
    for key, tensor in (
        cast("nn.ModuleDict", module._modules["parametrizations"]).state_dict(prefix=own, keep_vars=True).items()
    ):
        if key not in demanded:
            state_dict.setdefault(key, tensor)


def drop_upgraded_keys(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, before: set[str], unexpected: list[str]
) -> None:
    """Keep the base's value where the module itself has added a plain key to an old checkpoint (BatchNorm does).

    The upgrade inserts what the module reads, which is the active adapter's value.
    """
    for name, stack in live_stacks(module).items():
        if (key := f"{prefix}{name}") in state_dict and key not in before:
            del state_dict[key]
            state_dict.setdefault(f"{prefix}parametrizations.{name}.original", stack.original)
            unexpected[:] = [other for other in unexpected if other != key]
