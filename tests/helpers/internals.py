"""All that tests take from inside the library: where an internal is renamed, this is the one file to change."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from glora.engines import fsdp
from glora.files import checkpoint
from glora.files.adapter import digest, read
from glora.files.checkpoint import merge_checkpoint
from glora.kernels import blocks, matvec, select
from glora.kernels import joined as joined_kernel
from glora.kernels.select import Kernel

__all__ = [
    "Kernel",
    "chosen_kernel",
    "computed_updates",
    "entries_of_a_block",
    "entries_of_a_wide_block",
    "force_kernel",
    "fully_sharded_groups",
    "inside_operators",
    "interrupted_before",
    "is_unsupported",
    "joined",
    "kernels_taken",
    "masked_tokens",
    "merge_files",
    "sum_of_contents",
    "tensors_read",
    "wide_matvec",
]

wide_matvec = matvec.wide_matvec

joined = joined_kernel.linear

force_kernel = select.force

fully_sharded_groups = fsdp.groups


def chosen_kernel(layer: nn.Module, tokens: int, needs_grad: bool) -> Kernel:
    """The kernel that the layer would take for this many tokens."""
    stack = layer.parametrizations.weight
    with torch.set_grad_enabled(needs_grad):
        x = torch.empty(tokens, layer.in_features)
        return select.choose(x, stack.original, stack[0].factors(stack[0].acting.adapter_weights))


@contextmanager
def kernels_taken() -> Generator[list[Kernel]]:
    """Collects the kernel that each call of an adapted layer takes."""
    taken: list[Kernel] = []
    choose = select.choose

    def choosing(*given: Any) -> Kernel:
        taken.append(choose(*given))
        return taken[-1]

    with mock.patch.object(select, "choose", choosing):
        yield taken


def entries_of_a_block(entries: int) -> AbstractContextManager[Any]:
    """How many entries of W' the blockwise kernel computes at a time."""
    return mock.patch("glora.kernels.frozen.CPU_BLOCK", entries)


@contextmanager
def inside_operators(context: AbstractContextManager[Any]) -> Generator[None]:
    """Enters `context` in the blockwise kernel too where it is an operator that a compiled graph calls."""

    def within(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            with context:
                return function(*given)

        return call

    with (
        mock.patch.object(blocks, "forward", within(blocks.forward)),
        mock.patch.object(blocks, "backward", within(blocks.backward)),
    ):
        yield


def masked_tokens(most: int) -> AbstractContextManager[Any]:
    """Up to how many tokens of a sample times groups a route multiplies by all groups' factors."""
    return mock.patch("glora.kernels.samplewise.MASKED", most)


def entries_of_a_wide_block(entries: int) -> AbstractContextManager[Any]:
    """How many entries of a half-precision matrix `wide_matvec` widens at a time."""
    return mock.patch("glora.kernels.matvec._ENTRIES", entries)


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
