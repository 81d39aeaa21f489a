"""All that tests take from inside the library: where an internal is renamed, this is the one file to change."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from glora import torch_internals
from glora.engines import fsdp
from glora.files import checkpoint
from glora.files.adapter import digest, read
from glora.files.card import MARKER as CARD_MARKER
from glora.files.checkpoint import merge_checkpoint
from glora.files.container import bytes_of, plain_tensors
from glora.kernels import blockwise, row_blocks, select
from glora.kernels.factored import fused
from glora.kernels.select import Kernel
from glora.kernels.terms import Terms, terms_of
from glora.model.state import describe

__all__ = [
    "CARD_MARKER",
    "Kernel",
    "Terms",
    "bytes_of",
    "chosen_kernel",
    "computed_updates",
    "describe",
    "entries_of_a_block",
    "force_kernel",
    "fully_sharded_groups",
    "fused",
    "half_units",
    "inside_operators",
    "interrupted_before",
    "is_unsupported",
    "kernels_taken",
    "masked_tokens",
    "merge_files",
    "plain_tensors",
    "sum_of_contents",
    "tensors_read",
    "terms_of",
    "terms_of_layer",
    "wide_matvec",
]

fully_sharded_groups = fsdp.groups


def chosen_kernel(layer: nn.Module, tokens: int, needs_grad: bool) -> Kernel:
    """The kernel that the layer would take for this many tokens."""
    stack = layer.parametrizations.weight
    with torch.set_grad_enabled(needs_grad):
        x = torch.empty(tokens, layer.in_features)
        return select.choose(x, stack.original, stack[0].factors(stack[0].acting.adapter_weights))


def terms_of_layer(layer: nn.Module) -> Terms:
    """What the layer's active adapters do to its weight, added up."""
    stack = layer.parametrizations.weight
    return terms_of(stack.original, stack[0].factors(stack[0].acting.adapter_weights))


_choose = select.choose
_forced: list[Kernel | None] = [None]
_taken: list[list[Kernel]] = []


def _choosing(x: Tensor, W0: Tensor, adapters: Any) -> Kernel:
    chosen, forced = _choose(x, W0, adapters), _forced[-1]
    either = not torch.is_grad_enabled() and x.dtype != torch.float16 and chosen in ("blockwise", "expanded")
    if forced == "dense" or (either and forced in ("blockwise", "expanded")):
        chosen = forced
    for taken in _taken:
        taken.append(chosen)
    return chosen


@contextmanager
def force_kernel(kernel: Kernel | None) -> Generator[None]:
    """Take this kernel through every adapted layer that allows it, inside the `with` block; None: the library's choice.

    "dense" is always allowed, "blockwise" and "expanded" in place of each other. The innermost block counts.
    """
    _forced.append(kernel)
    try:
        with mock.patch.object(select, "choose", _choosing):
            yield
    finally:
        _forced.pop()


@contextmanager
def kernels_taken() -> Generator[list[Kernel]]:
    """Collects the kernel that each call of an adapted layer takes."""
    _taken.append([])
    try:
        with mock.patch.object(select, "choose", _choosing):
            yield _taken[-1]
    finally:
        _taken.pop()


def entries_of_a_block(entries: int) -> AbstractContextManager[Any]:
    """How many entries of a weight are taken at a time where it is taken in blocks of rows."""
    return mock.patch("glora.kernels.row_blocks.CPU_BLOCK", entries)


def half_units(there: bool) -> AbstractContextManager[Any]:
    """As on a processor that multiplies half precision by units of its own, or on one that does not."""
    return mock.patch.dict(torch_internals.CPU_UNITS, dict.fromkeys(torch_internals.CPU_UNITS, there))


@contextmanager
def inside_operators(context: AbstractContextManager[Any]) -> Generator[None]:
    """Enters `context` in the blockwise kernel too where it is an operator that a compiled graph calls."""

    def within(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            with context:
                return function(*given)

        return call

    with (
        mock.patch.object(blockwise, "forward", within(blockwise.forward)),
        mock.patch.object(blockwise, "backward", within(blockwise.backward)),
    ):
        yield


def masked_tokens(most: int) -> AbstractContextManager[Any]:
    """Up to how many tokens of a sample times groups a route multiplies by all groups' factors."""
    return mock.patch("glora.kernels.samplewise.MASKED", most)


def wide_matvec(matrix: Tensor, vector: Tensor, *, transposed: bool = False) -> Tensor:
    """`matrix @ vector`, or `matrix.T @ vector`, in the vector's dtype, with a block of rows widened at a time."""
    return row_blocks.multiply(vector.unsqueeze(0), matrix, transposed=transposed)[0]


@contextmanager
def computed_updates() -> Generator[list[object]]:
    """Collects the arguments of each computation of an update of W0 or b0."""
    computed: list[object] = []
    with (
        mock.patch("glora.functional.weight_update", lambda *given, **_: computed.append(given)),
        mock.patch("glora.functional.bias_update", lambda *given, **_: computed.append(given)),
    ):
        yield computed


def sum_of_contents(text: str, tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 sum that an adapter file keeps of its contents."""
    return digest(text, tensors)


def is_unsupported(skipped: Any) -> bool:
    """Whether a plan skips this layer because it cannot be adapted (rather than: it was asked to be left out)."""
    return skipped.unsupported


def merge_files(base: Path, adapter: Path, out: Path) -> None:
    """Merge an adapter's file into a checkpoint's, tensor by tensor."""
    merge_checkpoint(base, read(adapter), "it", out)


@contextmanager
def tensors_read() -> Generator[list[object]]:
    """Collects the tensors of a checkpoint that an offline merge reads."""
    taken: list[object] = []
    read_bytes = checkpoint._Entry.read

    def reading(entry: checkpoint._Entry) -> bytearray:
        taken.append(entry)
        return read_bytes(entry)

    with mock.patch.object(checkpoint._Entry, "read", reading):
        yield taken


@contextmanager
def interrupted_before(function: str) -> Generator[None]:
    """A KeyboardInterrupt where the library would call this function."""
    with mock.patch(function, side_effect=KeyboardInterrupt):
        yield
