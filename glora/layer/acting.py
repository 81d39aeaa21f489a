"""Which adapters act on a module, and how much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from glora.precision import is_exporting

Scales: TypeAlias = Mapping[str, Tensor]
"""Adapter name to scale: the adapters that act."""

# Note [Scales are tensors]
# An adapter's scale w_i is a 0-dimensional float64 tensor on the CPU, and no buffer. As a Python float it would be
# compiled in, and recompiled for each value; as a buffer it would be cast by `.half()` and wiped by `.to_empty()`.
# Being 0-dimensional it takes part in no type promotion, and needs no transfer to meet a tensor of another device.
# torch.compile takes such a tensor for a Python number, finds that nobody uses it as one, and traces the whole graph
# again. A Parameter it takes for a tensor at once; torch.export in turn wants every Parameter to be a module's.


class Acting:
    """The adapters that act on one module; its tensors share this object, so that one assignment switches them all.

    Attributes:
        compiled: the same scales as `scales`, as Parameters: for torch.compile (Note [Scales are tensors]).
    """

    def __init__(self) -> None:
        self.scales = {}

    @property
    def scales(self) -> Scales:
        """Replaced, never changed: a forward pass takes it once and keeps to it."""
        return self._scales

    @scales.setter
    def scales(self, scales: Scales) -> None:
        self.compiled: Scales = {name: nn.Parameter(scale, requires_grad=False) for name, scale in scales.items()}
        self._scales = scales

    def of_a_call(self) -> Scales:
        """What a forward pass that begins here takes."""
        return self.compiled if torch.compiler.is_compiling() and not is_exporting() else self._scales
