"""`parameter_groups`: an adapter's parameters for an optimizer, each with a learning rate that suits it."""

from __future__ import annotations

from dataclasses import replace
from numbers import Real
from typing import Any, cast

from torch import Tensor, nn

from glora.layer.factors import LowRank, balance_of
from glora.layer.heads import Head
from glora.layer.parametrization import Paths, Weight
from glora.model.adapters import named_parameters, resolve_name
from glora.model.change import walk_to_read
from glora.spec import join


def parameter_groups(model: nn.Module, lr: float, name: str | None = None) -> list[dict[str, Any]]:
    """The trainable parameters of an adapter, as groups for an optimizer of torch.

    Args:
        model: the model.
        lr: the learning rate of paths that are balanced, or need not be, and of heads.
        name: the adapter; None for the only one.

    Returns:
        `[{"name": "adapter", "lr": lr, "params": [...]}, {"name": "heads", ...}, ...]`, in an order that is that of the
        model's layers, so that an optimizer's state dict goes into another optimizer made alike. Groups that would be
        empty are left out. A low-rank A without a balance (`balance="none"`: PEFT's HiRA, files from before there was
        one) has a group for each layer, whose left factor trains at `lr / rms(W0)` (Note [Balance]): Adam moves every
        number by about the rate, and W0 multiplies what that does. A supernet's trains at `lr`.

    Raises:
        ValueError: an lr that is not positive; no `name`, and not exactly one adapter.
        KeyError: no adapter of that name.

    Source: Adam, arXiv 1412.6980, section 2.1 (the size of a step); the derivation is Note [Balance].

    Example:
        >>> import torch, glora
        >>> layer = glora.apply(torch.nn.Linear(4, 2))
        >>> optimizer = torch.optim.AdamW(glora.parameter_groups(layer, lr=2e-3))
        >>> [(group["name"], group["lr"], len(group["params"])) for group in optimizer.param_groups]
        [('adapter', 0.002, 2)]
    """
    if not isinstance(cast("object", lr), (Real, Tensor)) or not lr > 0:
        raise ValueError(f"lr must be a positive number; found {lr!r}. README's table has one for each preset.")
    walk = walk_to_read(model)
    name = resolve_name(walk, name)
    groups: list[dict[str, Any]] = [{"name": name, "lr": lr, "params": []} for name in ("adapter", "heads")]
    of_heads = {
        join(owner.path, tensor) for owner in walk for tensor, store in owner.stores.items() if isinstance(store, Head)
    }
    faster: dict[str, float] = {}
    for owner in walk:
        for tensor, store in owner.stores.items():
            part = store.parts().get(name)
            if not isinstance(store, Weight) or type(part) is not Paths:  # of a supernet the same A is a vector too
                continue
            A = part.paths().get("A")
            if isinstance(A, LowRank) and A.balance is None:
                W0 = store.matrix.read(owner.tensors[tensor])
                balance = balance_of(replace(part.config, balance="rms"), W0)
                key = join(store.matrix.path(owner.path), "A.left")
                faster[key] = 1.0 if balance is None else cast("float", balance.min().item())  # of experts, the largest
    for key, parameter in named_parameters(model, name):
        if key in faster:
            groups.append({"name": key, "lr": lr * faster[key], "params": [parameter]})
        else:
            groups[key in of_heads]["params"].append(parameter)
    return [group for group in groups if group["params"]]
