"""Modules that train as a whole: each adapter has its own copy of each of their tensors."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from glora.layer.parametrization import AdapterWeights, Store


class HeadCopy(nn.Module):
    """One adapter's own copy of a parameter or buffer."""

    value: Tensor

    def __init__(self, original: Tensor) -> None:
        super().__init__()
        copy = original.detach().clone()
        if isinstance(original, nn.Parameter):
            self.value = nn.Parameter(copy, requires_grad=copy.is_floating_point() or copy.is_complex())
        else:
            self.register_buffer("value", copy)

    @torch.no_grad()
    def reset_parameters(self, original: Tensor) -> None:
        """Start again from the base model's tensor."""
        self.value.copy_(original)


class SharedCopy(nn.Module):
    """In place of a second copy, on a tensor that is tied to one of a head: reads the head's (Note [Tied heads])."""

    source: HeadCopy

    def __init__(self, source: HeadCopy) -> None:
        super().__init__()
        self.__dict__["source"] = source

    @property
    def value(self) -> Tensor:
        """The head's copy itself."""
        return self.source.value


# Note [Tied heads]
# A head may be tied to other modules: one Parameter is in several places, as in an embedding and the output layer. The
# adapter has one copy, on the chosen module (the first of several). The other modules have a `SharedCopy`: a plain
# reference to the owner, and no child module, so that parameters, flags and state dicts list the tensor once. It refers
# to the owner and not to the tensor, which `to_empty` replaces. The originals stay one Parameter.
class Head(Store):
    """On each tensor of a trainable module: the copy of the adapter that acts, or the base model's tensor."""

    def forward(self, original: Tensor, adapter_weights: AdapterWeights | None = None) -> Tensor:
        """The copy itself, not a clone of it: what the module writes into a buffer is written into the copy."""
        acting = self.acting_copy(adapter_weights)
        return original if acting is None else acting.value

    def acting_copy(self, adapter_weights: AdapterWeights | None = None) -> HeadCopy | SharedCopy | None:
        """The copy of the adapter that acts; None where no acting adapter has one."""
        for name in self.acting.adapter_weights if adapter_weights is None else adapter_weights:
            if name in self._modules:
                return cast("HeadCopy | SharedCopy", self._modules[name])
        return None

    def may_train(self, name: str) -> bool:
        """Where it acts alone: heads that act together are equal, and do not train, so that they stay equal."""
        return [other for other in self.parts() if other in self.acting.adapter_weights] == [name]
