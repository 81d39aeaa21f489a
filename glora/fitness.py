"""Which layers and modules cannot be adapted, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from glora.config import BIAS_PATHS, WEIGHT_PATHS, GLoRAConfig
from glora.layer import adapters_of, has_linear_forward, parametrizations_of
from glora.parametrization import Head
from glora.tree import Found, join, own_tensors

# (module id, tensor name) to the other tensor's path
Ties: TypeAlias = dict[tuple[int, str], str]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def unfit_layer(layer: nn.Linear, config: GLoRAConfig, ties: Ties) -> str | None:
    """Why this layer cannot take paths, and what to do about it; None if it can."""
    if _is_foreign(layer, Head):
        return "it is parametrized by something else, which adapters would compose with; remove that first."
    tensors = own_tensors(layer)
    if "weight" not in tensors:
        return "it has no parameter `weight` (pruning and the older weight_norm replace it); undo that first."
    if "bias" not in tensors and "bias" not in layer._parameters:
        return "it has no parameter `bias`, not even None (pruning replaces it); undo that first."
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            return "its weight is lazy; run one batch through the model first."
        if name in ("weight", "bias") and tensor.dtype not in _DTYPES:
            return f"its {name} is {tensor.dtype} (quantised or complex); adapt a float copy of the layer."
        if is_traceable_wrapper_subclass(tensor):
            return f"its {name} is a {type(tensor).__name__}; adapt the layer before it is quantised or sharded."
    if tensors["weight"].numel() == 0:
        return f"its weight is empty, {tuple(tensors['weight'].shape)}; exclude it."
    for name, paths in (("weight", WEIGHT_PATHS), ("bias", BIAS_PATHS)):
        if (id(layer), name) in ties and any(config.forms[path] != "none" for path in paths):
            return (
                f"its {name} is tied to {ties[id(layer), name]}, which would change with it; untie them (give this "
                f"layer a clone), or leave it out with exclude=."
            )
    own_forward = not has_linear_forward(parametrize.type_before_parametrizations(layer)) or "forward" in vars(layer)
    # MultiheadAttention's output projection: its weight is read, and its forward never called.
    never_called = isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if config.rank_dropout and (own_forward or never_called):
        return "its forward is its own, and rank dropout acts in nn.Linear's; use rank_dropout=0."
    return None


def unfit_head(module: nn.Module, ties: Ties) -> str | None:
    """Why this module cannot train as a whole, and what to do about it; None if it can."""
    if isinstance(module, nn.RNNBase):
        return "it keeps its own list of weights, and would go on using the base model's; leave it frozen."
    if _is_foreign(module, type(None)) or any(not isinstance(a, Head) for a in adapters_of(module).values()):
        return "it is parametrized already (by another adapter's paths, or by something else); exclude it there first."
    for name, tensor in own_tensors(module).items():
        if is_lazy(tensor):
            return "it is lazy; run one batch through the model first."
        if is_traceable_wrapper_subclass(tensor):
            return f"its {name} is a {type(tensor).__name__}; adapt the model before it is quantised or sharded."
        if (id(module), name) in ties:
            return f"its {name} is tied to {ties[id(module), name]}, and a copy would not be; untie them first."
    return None


def _is_foreign(module: nn.Module, foreign: type[object]) -> bool:
    """Whether something that is not ours, or adapters of this kind, parametrizes the module."""
    ours = adapters_of(module)
    return any(
        name not in ours or isinstance(ours[name], foreign) or len(stack) > 1
        for name, stack in parametrizations_of(module).items()
    )


# Note [Ties]
# Two tensors are tied when they are one Parameter or share an element. Adapting one would silently change the other
# (torch's removal writes into it) or silently untie them. Address ranges tell which pairs could share one (on the meta
# device, which has no addresses, ranges within one storage); of those, views that interleave, as columns of one matrix
# do, are told apart by marking the elements. One module reached by two paths is no tie.
@dataclass(frozen=True)
class _Span:
    """Where a tensor lies: an address space, its first byte, and the byte behind its last."""

    space: int
    start: int
    end: int
    module: int
    name: str
    path: str
    tensor: Tensor


def find_ties(found: list[Found]) -> Ties:
    """The tensors of the model that share elements with another module's, each with the path of one of those."""
    spans = [
        _span(tensor, id(f.module), name, join(f.path, name))
        for f in found
        for name, tensor in own_tensors(f.module).items()
        if not is_lazy(tensor) and not is_traceable_wrapper_subclass(tensor) and tensor.numel()
    ]
    ties: Ties = {}
    reaching: list[_Span] = []
    for span in sorted(spans, key=lambda s: (s.space, s.start)):
        reaching = [other for other in reaching if other.space == span.space and other.end > span.start]
        for other in reaching:
            if _share_an_element(span, other):
                ties.setdefault((span.module, span.name), other.path)
                ties.setdefault((other.module, other.name), span.path)
        reaching.append(span)
    return ties


def _span(tensor: Tensor, module: int, name: str, path: str) -> _Span:
    storage = tensor.untyped_storage()
    size = tensor.element_size()
    start = storage.data_ptr() + int(tensor.storage_offset()) * size
    reach = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    space = 0 if storage.data_ptr() else storage._cdata
    return _Span(space, start, start + (reach + 1) * size, module, name, path, tensor)


def _share_an_element(one: _Span, other: _Span) -> bool:
    first, second = one.tensor, other.tensor
    size = first.element_size()
    if all(s.end - s.start == s.tensor.numel() * size for s in (one, other)):
        return True  # no gaps to interleave in
    if second.element_size() != size or (one.start - other.start) % size:
        return True
    start = min(one.start, other.start)
    taken = torch.zeros((max(one.end, other.end) - start) // size, dtype=torch.bool, device="cpu")
    taken.as_strided(first.shape, first.stride(), (one.start - start) // size).fill_(True)
    return bool(taken.as_strided(second.shape, second.stride(), (other.start - start) // size).any())
