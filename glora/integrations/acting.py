"""The adapter that a checkpoint holds: the one that acts, as the only one, and everything that trains is its own."""

from __future__ import annotations

from torch import nn

from glora.model.adapters import adapters, parameters
from glora.text import format_names, quote_names


def acting_adapter(model: nn.Module) -> str:
    """The name of the only adapter that acts.

    Raises:
        ValueError: none acts, or several; or a parameter that trains and is no adapter's.
    """
    acting = [name for name, scale in adapters(model).items() if scale]
    if len(acting) != 1:
        raise ValueError(
            f"A checkpoint of adapters holds the one that acts; found {quote_names(acting)}. Call glora.activate with "
            f"the adapter that trains."
        )
    own = {id(parameter) for parameter in parameters(model, acting[0])}
    others = [key for key, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if others:
        raise ValueError(
            f"A checkpoint of adapters must hold everything that trains; {format_names(others)} are no part of "
            f"{acting[0]!r}. Freeze them (freeze=True), give them to the adapter (trainable=), or save whole ones."
        )
    return acting[0]
