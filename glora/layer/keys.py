"""A plain checkpoint of the base model loads into an adapted module, whose adapters stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from glora.layer.heads import HeadCopy
from glora.layer.parametrization import biases_of, live_parametrizations, stores_of

# What an engine does to a state dict with plain keys before it is loaded, given the frozen tensors by these keys.
before_plain_keys: list[Callable[[dict[str, Any], dict[str, Tensor]], None]] = []


# Note [Kept apart]
# A state dict can carry metadata for each module, which torch hands to it as it loads. A framework that keeps adapters
# elsewhere and gives an empty state dict leaves the name of the call that loads them there. Without it, a state dict
# that has nothing for an adapted module is either a long list of missing keys or, with strict=False, no change.
KEPT_APART = "glora_kept_apart"


def refuse_kept_apart(metadata: Mapping[str, object]) -> None:
    """Raise RuntimeError where a module's adapters are elsewhere in the checkpoint (Note [Kept apart])."""
    if KEPT_APART in metadata:
        raise RuntimeError(
            f"This state dict must be loaded with the adapter that was saved beside it; found it alone, and empty. "
            f"Call {metadata[KEPT_APART]}."
        )


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
    for prepare in before_plain_keys:
        prepare(state_dict, {f"{prefix}{name}": own[f"{inner}{name}.original"] for name in names})
    plain = [name for name in names if f"{prefix}{name}" in state_dict]
    # A created bias has no plain key; its weight, which may have no adapter, has one.
    if not plain and not any(f"{prefix}{bias.matrix.weight}" in state_dict for bias in biases.values()):
        return
    for name in plain:
        state_dict[f"{inner}{name}.original"] = state_dict.pop(f"{prefix}{name}")
    if not any(name in module._parameters for name in names):  # no head: running statistics alone
        _follow(module, plain, state_dict, inner)
    created = {name for name, bias in biases.items() if bias.created}
    demanded = {f"{inner}{name}.original" for name in names if name not in created}
    for key, tensor in own.items():
        if key not in demanded:
            state_dict.setdefault(key, tensor)


def _follow(module: nn.Module, names: list[str], state_dict: dict[str, Any], inner: str) -> None:
    """Let copies of running statistics that are the base's still follow what is loaded into the base."""
    for name in names:
        original = live_parametrizations(module)[name].original
        for adapter, part in stores_of(module)[name].parts().items():
            if isinstance(part, HeadCopy) and torch.equal(part.value, original):
                state_dict.setdefault(f"{inner}{name}.0.{adapter}.value", state_dict[f"{inner}{name}.original"])


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
