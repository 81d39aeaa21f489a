"""Reading a tensor of an adapted module: W', b', or a head's copy, computed once a call."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from glora.layer import routed
from glora.layer.checkpointed import of_first_run
from glora.layer.heads import Head
from glora.layer.parametrization import (
    AdapterWeights,
    Bias,
    Parametrizations,
    Store,
    Weight,
    live_parametrizations,
)
from glora.matrices import Matrix
from glora.torch_internals import memory_of, running_backward, saved_tensors_hooks


def read(module: nn.Module, name: str) -> Tensor:
    """The tensor `name` of an adapted module, as its attribute gives it."""
    return cast("Tensor", getattr(module, name))


def read_attribute(module: nn.Module, parametrizations: Parametrizations, name: str) -> Tensor | None:
    """Value of the attribute `name`, which glora or somebody else parametrizes."""
    parametrization, call, key = parametrizations[name], _call_of(module), (name, torch.is_grad_enabled())
    if call is not None and key in call.values:
        return call.values[key]
    adapter_weights = (adapter_weights_of if call is None else call.adapter_weights_of)(module, parametrizations)
    value = tensor_of(module, parametrizations, name, adapter_weights)
    is_head = isinstance(parametrization._modules["0"], Head)
    if call is not None and not (is_head and name in module._buffers):  # which the module may bind anew
        call.values[key] = value
    if not is_head and value is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _attach_frozen_weight(parametrizations, name, parametrization.original, value)
    return value


def adapter_weights_in_call(module: nn.Module, parametrizations: Parametrizations) -> AdapterWeights:
    """The adapters that act on the module; in a call of it, those that acted when it first read a tensor."""
    call = _call_of(module)
    return (adapter_weights_of if call is None else call.adapter_weights_of)(module, parametrizations)


def adapter_weights_of(module: nn.Module, parametrizations: Parametrizations) -> AdapterWeights:
    """The adapters that act on the module: looked up once for all of its tensors (Note [Never torn])."""
    for parametrization in list(parametrizations.values()):
        store = parametrization._modules["0"]
        if isinstance(store, Store):
            active = store.acting.of_a_call()
            if not torch.compiler.is_compiling() and (
                saved_tensors_hooks(False) is not None
                or running_backward() != -1
                or (module.training and not torch.is_grad_enabled())  # a reentrant region's first run
            ):
                active = of_first_run(module, parametrizations, active)
            return routed.adapter_weights_of(module, active) if routed.active_routes else active
    return {}


def tensor_of(
    module: nn.Module,
    parametrizations: Parametrizations,
    name: str,
    adapter_weights: AdapterWeights,
    dropout: bool = False,
) -> Tensor | None:
    """A tensor of an adapted module: the plain one where one is in its place, else the computed one."""
    if name in module._parameters:
        plain = module._parameters[name]
    else:  # a buffer; or an attribute that a hook sets, as pruning and the older weight_norm do
        plain = module._buffers.get(name, module.__dict__.get(name))
    if plain is not None or name not in parametrizations:
        return plain
    parametrization = parametrizations[name]
    store, *others = parametrization._modules.values()
    try:
        if isinstance(store, Weight):
            value = store(parametrization.original, adapter_weights, dropout)
        elif isinstance(store, Bias):
            W0 = _frozen_weight(module, parametrizations, store.matrix.weight)
            value = store(parametrization.original, W0, adapter_weights, dropout)
        elif isinstance(store, Head):
            value = store.forward(parametrization.original, adapter_weights)  # BatchNorm reads it seven times a call
        else:  # somebody else's, on a tensor without adapters
            return cast("Callable[[], Tensor]", parametrization)()
        for other in others:
            value = other(value)
        return value
    except AttributeError as error:
        # Python would take it for the attribute's own and say that there is no attribute `name`.
        raise RuntimeError(f"Computing `{name}` of an adapted {type(module).__name__} failed: {error}") from error


def kernel_weight(module: nn.Module, parametrizations: Parametrizations, matrix: Matrix | None = None) -> Weight | None:
    """The adapters on the weight, if a kernel may stand for it: nothing else computes it, and `matrix` holds it."""
    parametrization = parametrizations.get("weight")
    if parametrization is None or module._parameters.get("weight") is not None or len(parametrization._modules) > 1:
        return None
    store = parametrization._modules["0"]
    if not isinstance(store, Weight) or (matrix is not None and store.matrix.pattern != matrix.pattern):
        return None
    return store


def _frozen_weight(module: nn.Module, parametrizations: Parametrizations, name: str) -> Tensor:
    """W0: under its parametrization, or the plain tensor (Note [Bias needs the frozen weight])."""
    if name in parametrizations and isinstance(parametrizations[name]._modules["0"], Weight):
        return parametrizations[name].original
    return read(module, name)


# Note [Reading once]
# A forward of a module's own may read a tensor many times (experts do, once for each). During such a call each tensor
# of the called module is computed once, and all of them by the adapters that acted at the first read (Note [Never
# torn]). Not under torch.compile, which merges equal computations.
@dataclass
class _Call:
    module: int  # the id of the called module
    values: dict[tuple[str, bool], Tensor | None] = field(default_factory=dict[tuple[str, bool], Tensor | None])
    adapter_weights: AdapterWeights | None = None  # None before the first read

    def adapter_weights_of(self, module: nn.Module, parametrizations: Parametrizations) -> AdapterWeights:
        if self.adapter_weights is None:
            self.adapter_weights = adapter_weights_of(module, parametrizations)
        return self.adapter_weights


_calls: ContextVar[_Call | None] = ContextVar("glora_calls", default=None)


def _call_of(module: nn.Module) -> _Call | None:
    """The call of this very module that is under way in this thread or task, if there is one that keeps its reads."""
    call = None if torch.compiler.is_compiling() else _calls.get()
    return call if call is not None and call.module == id(module) else None


def caching_reads(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward, with a `_Call` that lives until it returns."""

    @functools.wraps(forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        token = _calls.set(_Call(id(self)))
        try:
            return forward(self, *args, **kwargs)
        finally:
            _calls.reset(token)

    return call


# Note [Removal order]
# `remove_parametrizations(layer, "weight")` reads `layer.weight` under no_grad and at once does `original.set_(W')`:
# W0 is gone, and a path C of the bias would multiply W'. So that read attaches an alias of W0 (no bytes are copied) to
# the W' that it returns; both are freed together. Torch then registers the original, with W' in it, as the module's
# parameter: `freeze_prompts` takes W0 from the alias and replaces each C by the vector W0 C, which trains no more.
#
# With `leave_parametrized=False`, or where no adapter acts, the original is W0 still: C multiplies the plain parameter,
# and trains on. If the bias goes first there is nothing to do.
def _attach_frozen_weight(parametrizations: Parametrizations, name: str, original: Tensor, value: Tensor) -> None:
    for bias in _prompted_biases(parametrizations, name):
        if value is not original:
            vars(value)["glora_frozen"] = original.detach()
            bias.last_read = weakref.ref(value)


def freeze_prompts(module: nn.Module, name: str, restored: Tensor | None) -> None:
    """Where torch's removal has just baked the weight `name` in: freeze what multiplies it."""
    for bias in _prompted_biases(live_parametrizations(module), name) if restored is not None else ():
        value = bias.last_read() if bias.last_read is not None else None
        if value is not None and memory_of(value) == memory_of(cast("Tensor", restored)):
            bias.freeze_prompts(vars(value)["glora_frozen"])


def _prompted_biases(parametrizations: Parametrizations, weight: str) -> list[Bias]:
    """The biases of a module that multiply this weight."""
    stores = [parametrization._modules["0"] for parametrization in list(parametrizations.values())]
    return [b for b in stores if isinstance(b, Bias) and b.matrix.weight == weight and b.has_prompt()]
