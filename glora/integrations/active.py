"""The adapter that a checkpoint holds: the only active one, and everything that trains belongs to it."""

from __future__ import annotations

from torch import nn

from glora.fingerprint import agrees
from glora.model.adapters import adapters, parameters
from glora.model.state import base_state_dict, describe, load_state_dict, padded, state_dict
from glora.spec import AdapterFileError, AdapterSpec, differences, report_other_base
from glora.text import format_names, format_problems, quote_names


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


def restore(model: nn.Module, spec: AdapterSpec, source: object) -> None:
    """Write a checkpoint's adapter into the active one, which must be the same function of its tensors.

    Raises:
        AdapterFileError: another description (layers, forms, rank, scale, product, heads); nothing has changed.
        ValueError: as `active_adapter` raises.

    Warns:
        UserWarning: frozen tensors, by name, that are not those beside which the adapter was trained.
    """
    name = active_adapter(model)
    problems = list(differences(describe(model, name), spec))
    if problems:
        raise AdapterFileError(
            f"A checkpoint goes on under the description that it was trained under; {source} does not hold the adapter "
            f"{name!r} as it is attached. Nothing was changed. Found: {format_problems(problems, most=2)}. Attach it "
            f"with the config of the checkpoint."
        )
    base = base_state_dict(model)
    others = [key for key, known in spec.base.items() if key in base and not agrees(base[key], known)]
    report_other_base(others, source, strict=False, stacklevel=2)
    load_state_dict(model, padded(spec.tensors, state_dict(model, name)), name)
