"""A module made plain and merged for a while, and restored (Note [Merged for a while])."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from glora.layer.computed import read
from glora.layer.parametrization import Bias, Parametrizations, Stash, live_parametrizations, stashed, stores_of
from glora.layer.recurrent import follow_tensors

# Note [Never torn]
# A forward pass may be running in another thread while a module is swapped. It looks the parametrizations up once, or
# reads the plain tensors one by one. So the plain tensors are set before the parametrizations go, and the
# parametrizations are back before the plain tensors go: in between both give the same values.
#
# Each call of one module keeps to the adapters that acted when it began to read: `glora.layer.forward` takes them once,
# and other forwards by `_Call` (Note [Reading once]). Two limits stay. A call that began inside `glora.merged` may look
# a plain tensor up at the very moment when the block ends, and finds None: torch's own `__getattr__` runs there. And
# nn.MultiheadAttention reads two tensors of another module, its `out_proj`.


def merged_tensors(module: nn.Module) -> dict[str, Tensor | None]:
    """W' and b' of an adapted module as the tensors of a plain one; None for a created bias that nothing acts on."""
    tensors: dict[str, Tensor | None] = {}
    stores = stores_of(module)
    for name, parametrization in live_parametrizations(module).items():
        store = stores.get(name)
        if isinstance(store, Bias) and store.created and not store.is_active():
            tensors[name] = None
            continue
        # An alias: where the value is a head's copy or W0 itself, its flags and `.data` must not change inside.
        value = read(module, name).detach()
        is_parameter = isinstance(parametrization.original, nn.Parameter)
        tensors[name] = nn.Parameter(value, requires_grad=False) if is_parameter else value
    return tensors


def swap_in(module: nn.Module, values: dict[str, Tensor | None]) -> None:
    """Make an adapted module plain, with these tensors, until `restore`; takes no memory."""
    parametrizations = live_parametrizations(module)
    modules = cast("nn.ModuleDict", module._modules["parametrizations"])
    stashed[module] = Stash(modules, type(module))  # first: from here on `restore` undoes it
    for name, value in values.items():
        _place(module, name, parametrizations)[name] = value
    follow_tensors(module)
    module.__class__ = type(module).__bases__[0]
    del module._modules["parametrizations"]


def restore(module: nn.Module) -> None:
    """Undo `swap_in`: the adapters and the very originals again, on the device and in the dtype of the module now.

    Called again after an interrupt, it continues.
    """
    stash = stashed.get(module)
    if stash is None:
        return
    parametrizations = cast("Parametrizations", stash.parametrizations._modules)
    if "parametrizations" not in module._modules:  # the plain tensors, which may have been moved, are all there
        tensors = (*module._parameters.values(), *module._buffers.values())
        floating = next((t for t in tensors if t is not None and t.is_floating_point()), None)
        for name, parametrization in parametrizations.items():
            like = _place(module, name, parametrizations).get(name)
            like = floating if like is None else like
            original = parametrization.original
            if like is not None and (like.device, like.dtype) != (original.device, original.dtype):
                # Where the dtype has not changed, float32 factors on a half-precision base keep theirs.
                parametrization.to(like.device, None if like.dtype == original.dtype else like.dtype)
        stash.parametrizations.train(module.training)
        module._modules["parametrizations"] = stash.parametrizations
    module.__class__ = stash.adapted_class
    for name in parametrizations:
        _place(module, name, parametrizations)[name] = None
    follow_tensors(module)
    del stashed[module]


def _place(module: nn.Module, name: str, parametrizations: Parametrizations) -> dict[str, Tensor | None]:
    is_parameter = isinstance(parametrizations[name].original, nn.Parameter)
    return module._parameters if is_parameter else module._buffers  # pyright: ignore
