"""A module as a plain one, merged, for a while: swapped in, and restored (Note [Merged for a while])."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from glora.layer.adapted import read
from glora.layer.parametrization import Bias, Parametrizations, Stash, live_parametrizations, stashed, stores_of

# Note [Never torn]
# A forward pass may be under way in another thread while a module is swapped. It takes what parametrizes the module
# once, or reads the plain tensors one by one. So the plain tensors are in their places before the parametrizations go,
# and the parametrizations are back before the plain tensors go: in between both give the same values.


def merged_tensors(module: nn.Module) -> dict[str, Tensor | None]:
    """W' and b' of an adapted module as the tensors of a plain one; None for a created bias that nothing acts on."""
    found: dict[str, Tensor | None] = {}
    adapters = stores_of(module)
    for name, stack in live_parametrizations(module).items():
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
    stacks = live_parametrizations(module)
    lists = cast("nn.ModuleDict", module._modules["parametrizations"])
    stashed[module] = Stash(lists, type(module))  # first: from here on `restore` undoes it
    for name, value in values.items():
        _place(module, name, stacks)[name] = value
    module.__class__ = type(module).__bases__[0]
    del module._modules["parametrizations"]


def restore(module: nn.Module) -> None:
    """Undo `swap_in`: the adapters and the very originals again, where the module has been moved to.

    Called again after an interrupt, it goes on where it was.
    """
    stash = stashed.get(module)
    if stash is None:
        return
    lists = stash.lists
    stacks = cast("Parametrizations", lists._modules)
    if "parametrizations" not in module._modules:  # while the plain tensors, which may have been moved, are all there
        own = (*module._parameters.values(), *module._buffers.values())
        somewhere = next((t for t in own if t is not None and t.is_floating_point()), None)
        for name, stack in stacks.items():
            like = _place(module, name, stacks).get(name)
            like = somewhere if like is None else like
            if like is not None and _placed(like) != _placed(stack.original):
                stack.to(*_placed(like))
        lists.train(module.training)
        module._modules["parametrizations"] = lists
    module.__class__ = stash.adapted_class
    for name in stacks:
        _place(module, name, stacks)[name] = None
    del stashed[module]


def _place(module: nn.Module, name: str, stacks: Parametrizations) -> dict[str, Tensor | None]:
    return module._parameters if isinstance(stacks[name].original, nn.Parameter) else module._buffers  # pyright: ignore


def _placed(tensor: Tensor) -> tuple[torch.device, torch.dtype]:
    return tensor.device, tensor.dtype
