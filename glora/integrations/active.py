"""The adapter that a checkpoint holds: the only active one, and everything that trains belongs to it."""

from __future__ import annotations

from torch import nn

from glora.model.adapters import adapters, parameters
from glora.text import format_names, quote_names


def active_adapter(model: nn.Module) -> str:
    """The name of the only active adapter.

    Raises:
        ValueError: none is active, or several are; or a parameter trains that does not belong to it.
    """
    active = [name for name, weight in adapters(model).items() if weight]
    if len(active) != 1:
        raise ValueError(
            f"A checkpoint of adapters holds the one that acts; found {quote_names(active)}. Call glora.activate with "
            f"the adapter that trains."
        )
    saved = {id(parameter) for parameter in parameters(model, active[0])}
    lost = [key for key, p in model.named_parameters() if p.requires_grad and id(p) not in saved]
    if lost:
        raise ValueError(
            f"A checkpoint of adapters must hold everything that trains; {format_names(lost)} are no part of "
            f"{active[0]!r}. Freeze them (freeze=True), give them to the adapter (trainable=), or save checkpoints of "
            f"the model."
        )
    return active[0]
