"""A LoRA that acts alone on a plain nn.Linear, told at a glance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glora.functional import ONE
from glora.layer import routed
from glora.layer.factors import LowRank
from glora.layer.parametrization import Paths, Weight
from glora.torch_internals import is_watched

_DTYPES = (torch.float32, torch.float64)
_ABSENT: Any = object()


# Note [At a glance]
# One token's product with W0 takes no longer than the fifty calls by which `forward` learns what acts, in which dtypes
# and by which kernel. So the commonest adapted layer is told by its types and dictionaries alone: one LoRA of weight
# and scale 1, on plain tensors of one dtype. What is not exactly that, in the layer or around it, goes the general way,
# whose outputs and gradients are these to the bit.
def lone_lora(module: nn.Module, input: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor] | None:
    """W0, bias, `left` and `right` of an adapted nn.Linear where one LoRA is all there is (Note [At a glance])."""
    if is_watched() or routed.active_routes:
        return None
    bias = module._parameters.get("bias", _ABSENT)  # first: another thread may adapt it meanwhile (Note [Never torn])
    stacks: Any = module._modules.get("parametrizations")
    if type(stacks) is not nn.ModuleDict or len(stacks._modules) != 1 or module._parameters.get("weight") is not None:
        return None
    stack: Any = stacks._modules.get("weight")
    if stack is None or len(stack._modules) != 1:
        return None
    store = stack._modules["0"]
    if type(store) is not Weight or not store.matrix.is_linear or len(acting := store.acting.adapter_weights) != 1:
        return None
    ((name, adapter_weight),) = acting.items()
    paths = store._modules.get(name)
    if adapter_weight is not ONE or type(paths) is not Paths or len(paths._modules) != 1:
        return None
    B: Any = paths._modules.get("B")
    is_graded, dtype = torch.is_grad_enabled(), input.dtype
    if type(B) is not LowRank or B.scaling != 1.0 or (module.training and (B.dropout or not is_graded)):
        return None  # in training without gradients this may be the first run of a checkpointed region
    factors: Any = B._parameters
    # Replicas of DataParallel, flattened and pruned modules hold their tensors elsewhere: none of the three is sure.
    W0, left, right = stack._parameters.get("original"), factors.get("left"), factors.get("right")
    for tensor in (W0, left, right) if bias is None else (W0, left, right, bias):
        if type(tensor) is not nn.Parameter or tensor.dtype is not dtype:
            return None
    if W0.is_meta or W0.requires_grad or (is_graded and not right.requires_grad):
        return None
    is_plain = type(input) is Tensor and dtype in _DTYPES and not input.is_nested and input.shape[-1:] == W0.shape[1:]
    return (W0, bias, left, right) if is_plain else None  # pyright: ignore[reportReturnType] - the loop saw to it
