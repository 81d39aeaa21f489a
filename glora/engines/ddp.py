"""DistributedDataParallel synchronises the parameters that could train when it was made; others are refused."""

from __future__ import annotations

import gc
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from glora.model.change import Engine, engines
from glora.model.walk import adapted_owners

# Note [Activated after wrapping]
# DistributedDataParallel averages the gradients of the parameters that asked for one when it was made, and leaves all
# others alone without a word: an adapter that is attached or activated later would train apart on every rank. Whether
# it is going to train cannot be known before its first gradient (it may only serve), so that is when it is checked.
# Nothing leads from a module to the wrapper around it: the live ones are searched for, once for each change.

_WATCHED = "glora_watched"  # an attribute of the parameter: like the hook, no copy of it has it


def check_sync(model: nn.Module) -> None:
    """Let the first backward pass raise RuntimeError where a wrapper has adapters that it does not synchronise."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    stores = [store for owner in adapted_owners(model) for store in owner.stores.values()]
    parameters = [parameter for store in stores for parameter in store.parameters()]
    watched = [p for p in parameters if p.requires_grad and _WATCHED not in vars(p)]

    def check(_: Tensor) -> None:
        _refuse_unsynchronised(watched)
        for parameter, handle in zip(watched, handles, strict=True):
            handle.remove()
            vars(parameter).pop(_WATCHED, None)

    handles = [cast("Any", parameter).register_hook(check) for parameter in watched]
    for parameter in watched:
        vars(parameter)[_WATCHED] = True


def _refuse_unsynchronised(parameters: list[nn.Parameter]) -> None:
    wrappers = [o for o in gc.get_objects() if issubclass(cast("type[object]", type(o)), DistributedDataParallel)]
    inside = {id(parameter) for wrapper in wrappers for parameter in wrapper.parameters()}
    # One wrapper is enough: another may have been replaced, and wait to be collected.
    synchronised = {
        id(parameter)
        for wrapper in wrappers
        for bucket in wrapper.reducer._get_zeros_like_grad_buckets()
        for parameter in bucket.parameters()
    }
    if any(id(parameter) in inside - synchronised for parameter in parameters):
        raise RuntimeError(
            "DistributedDataParallel synchronises what could train when it was made; an adapter that was attached or "
            "activated later has got a gradient, and would train apart on every rank. Wrap the model again after "
            "glora.activate or glora.apply: model = DistributedDataParallel(model.module)."
        )


def _nothing(*_: object) -> None:
    """DistributedDataParallel needs nothing here."""


engines.append(Engine(_nothing, _nothing, check_sync))
