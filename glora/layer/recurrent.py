"""Recurrent modules, which keep their weights in a list too."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

# Note [Flat weights]
# nn.RNN, nn.GRU and nn.LSTM compute with a list of their weights, `_flat_weights`, that they fill when they are made
# and moved. While one is adapted its class has a property in the list's place, which reads each weight by its name, as
# every other module does. The list itself, in the module's `__dict__`, holds the tensors that are plain: all of them
# once adapters are off, and None for each that is adapted, so that nothing stale is kept.


def flat_weights(module: nn.Module) -> list[Tensor | None]:
    """The weights by their names, adapted or plain."""
    rnn: Any = module
    return [getattr(rnn, name, None) for name in rnn._flat_weights_names]


def follow_tensors(module: nn.Module) -> None:
    """Let a recurrent module's own list hold the tensors that are plain now; other modules have none."""
    if isinstance(module, nn.RNNBase):
        names: list[str] = vars(module)["_flat_weights_names"]
        plain = [module._parameters.get(name) for name in names]
        vars(module)["_flat_weights"] = plain
        vars(module)["_flat_weight_refs"] = [None if tensor is None else weakref.ref(tensor) for tensor in plain]
