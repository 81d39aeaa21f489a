"""What a module's own forward reads of its adapted tensors, computed once a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import nn

Value = TypeVar("Value")

# Note [Reading once]
# A forward of a module's own may read a tensor many times (experts do, once for each). Inside such a call, and for the
# module that was called alone, each is computed once. Not while compiling, where the compiler finds what is equal.
_calls: ContextVar[tuple[int, dict[tuple[str, bool], Any]] | None] = ContextVar("glora_calls", default=None)


def caching_reads(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward, with what `cached_in_call` computes inside of it kept until it returns."""

    @functools.wraps(forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        token = _calls.set((id(self), {}))
        try:
            return forward(self, *args, **kwargs)
        finally:
            _calls.reset(token)

    return call


def cached_in_call(module: nn.Module, name: str, compute: Callable[[], Value]) -> Value:
    """The tensor `name` of a module, computed anew unless this call has read it already."""
    call = None if torch.compiler.is_compiling() else _calls.get()
    if call is None or call[0] != id(module):
        return compute()
    key = name, torch.is_grad_enabled()
    if key not in call[1]:
        call[1][key] = compute()
    return call[1][key]
