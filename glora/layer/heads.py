"""Modules that train as a whole: each adapter has its own copy of each of their tensors."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from glora.layer.parametrization import AdapterWeights, Store
from glora.precision import as_dtype, is_half

# Note [Heads in half precision]
# A step of a usual learning rate is smaller than the spacing of bfloat16's numbers, and rounds to nothing; float16 has
# gradients that `GradScaler` refuses. So an adapter's copy of a half-precision parameter is float32, as its factors
# are, and so are its gradients, its optimizer's state and its file. The module reads it rounded to the base's dtype
# (autograd takes the gradient back), and computes what it always did. Buffers are copied as they are: modules write
# into them.


class HeadCopy(nn.Module):
    """One adapter's own copy of a parameter (Note [Heads in half precision]) or buffer."""

    value: Tensor

    def __init__(self, original: Tensor) -> None:
        super().__init__()
        copy = original.detach().clone()
        if isinstance(original, nn.Parameter):
            copy = copy.float() if is_half(copy.dtype) else copy
            self.value = nn.Parameter(copy, requires_grad=copy.is_floating_point() or copy.is_complex())
        else:
            self.register_buffer("value", copy)

    def read(self, dtype: torch.dtype) -> Tensor:
        """What the module reads: a parameter in the base's dtype, the copy itself where it has it."""
        return as_dtype(self.value, dtype) if "value" in self._parameters else self.value

    def held(self) -> dict[str, Tensor]:
        """Key to tensor: one."""
        return {"value": self.value}

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

    def read(self, dtype: torch.dtype) -> Tensor:
        """What the module reads."""
        return self.source.read(dtype)


# Note [Tied heads]
# A head may be tied to other modules: one Parameter is in several places, as in an embedding and the output layer. The
# adapter has one copy, on the chosen module (the first of several). The other modules have a `SharedCopy`: a plain
# reference to the owner, and no child module, so that parameters, flags and state dicts list the tensor once. It refers
# to the owner and not to the tensor, which `to_empty` replaces. The originals stay one Parameter.
class Head(Store):
    """On each tensor of a trainable module: the copy of the adapter that acts, or the base model's tensor."""

    def forward(self, original: Tensor, adapter_weights: AdapterWeights | None = None) -> Tensor:
        """What acts, in the original's dtype. No clone: what the module writes into a buffer is in the copy."""
        acting = self.acting_copy(adapter_weights)
        return original if acting is None else acting.read(original.dtype)

    def acting_copy(self, adapter_weights: AdapterWeights | None = None) -> HeadCopy | SharedCopy | None:
        """The copy of the adapter that acts; None where no acting adapter has one."""
        for name in self.acting.adapter_weights if adapter_weights is None else adapter_weights:
            if name in self._modules:
                return cast("HeadCopy | SharedCopy", self._modules[name])
        return None

    def is_rounded(self, original: Tensor) -> bool:
        """Whether the copy that acts is read in another dtype than it is held in."""
        acting = self.acting_copy()
        return acting is not None and isinstance(original, nn.Parameter) and acting.value.dtype != original.dtype

    def may_train(self, name: str) -> bool:
        """Where it acts alone: heads that act together are equal, and do not train, so that they stay equal."""
        return [other for other in self.parts() if other in self.acting.adapter_weights] == [name]
