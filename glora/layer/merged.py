"""A module as a plain one, merged, for a while: swapped in, and restored (Note [Merged for a while])."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from glora.layer.adapted import read
from glora.layer.parametrization import Bias, Stacks, adapters_of, live_stacks, stashed

# Note [Never torn]
# A forward pass may be under way in another thread while a module is swapped. It takes what parametrizes the module
# once, or reads the plain tensors one by one. So the plain tensors are in their places before the parametrizations go,
# and the parametrizations are back before the plain tensors go: in between both give the same values.


def merged_tensors(module: nn.Module) -> dict[str, Tensor | None]:
    """W' and b' of an adapted module as the tensors of a plain one; None for a created bias that nothing acts on."""
    found: dict[str, Tensor | None] = {}
    adapters = adapters_of(module)
    for name, stack in live_stacks(module).items():
        store = adapters.get(name)
        if isinstance(store, Bias) and store.created and not store.is_active():
            found[name] = None
            continue
        value = read(module, name).detach()
        # A head's copy, or W0 itself: another tensor, so that what happens inside to its flags or data stays inside.
        value = value.view_as(value)
        found[name] = nn.Parameter(value, requires_grad=False) if isinstance(stack.original, nn.Parameter) else value
    return found


def swap_in(module: nn.Module, values: dict[str, Tensor | None]) -> None:
    """Make an adapted module plain, with these tensors, until `restore`; takes no memory."""
    stacks = live_stacks(module)
    for name, value in values.items():
        _place(module, name, stacks)[name] = value
    lists = stashed[module] = cast("nn.ModuleDict", module._modules["parametrizations"])
    vars(lists)["adapted_class"] = type(module)  # the registry holds it weakly
    module.__class__ = type(module).__bases__[0]
    del module._modules["parametrizations"]


def restore(module: nn.Module) -> None:
    """Undo `swap_in`: the adapters and the very originals again, where the module has been moved to.

    Called again after an interrupt, it goes on where it was.
    """
    lists = stashed.get(module)
    if lists is None:
        return
    stacks = cast("Stacks", lists._modules)
    somewhere = next(
        (t for tensors in (module._parameters, module._buffers) for t in tensors.values() if t is not None), None
    )
    likes = {name: _place(module, name, stacks).get(name) for name in stacks}
    module._modules["parametrizations"] = lists
    module.__class__ = vars(lists).pop("adapted_class", type(module))
    for name in stacks:
        _place(module, name, stacks)[name] = None
    lists.train(module.training)
    del stashed[module]
    for name, stack in stacks.items():
        like = somewhere if likes[name] is None else likes[name]
        if like is not None and _placed(like) != _placed(stack.original):
            stack.to(*_placed(like))


def _place(module: nn.Module, name: str, stacks: Stacks) -> dict[str, Tensor | None]:
    return module._parameters if isinstance(stacks[name].original, nn.Parameter) else module._buffers  # pyright: ignore


def _placed(tensor: Tensor) -> tuple[torch.device, torch.dtype]:
    return tensor.device, tensor.dtype
