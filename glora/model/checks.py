"""Which layers and modules cannot be adapted, and what to do about it."""

from __future__ import annotations

from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from glora.config import BIAS_PATHS, WEIGHT_PATHS, GLoRAConfig
from glora.layer.heads import Head
from glora.layer.parametrization import Bias, Weight, parametrizations_of
from glora.matrices import has_embedding_forward, has_linear_forward
from glora.model.huggingface import is_offloaded
from glora.model.records import PlannedHead
from glora.model.walk import Owner, Site
from glora.precision import DTYPES
from glora.spec import join
from glora.tensors import is_quantised, is_sharded, is_tensor_parallel, rows, storage_of
from glora.torch_internals import is_traceable_wrapper_subclass, memory_of, tree_leaves

# (module id, tensor name) to the other tensor's path
Ties: TypeAlias = dict[tuple[int, str], str]

# What torchao's tensors call what they do to their inputs.
_ON_INPUTS = ("act_quant_kwargs", "act_quant_scale", "act_pre_scale", "activation_quantization")


def unsupported_matrix(site: Site, config: GLoRAConfig, ties: Ties) -> str | None:
    """Why this matrix cannot take paths, and what to do about it; None if it can."""
    owner, layer, tensors, matrix = site.owner, site.module, site.owner.tensors, site.matrix
    if _is_foreign(owner, Head):
        return "it is parametrized by something else, which adapters would compose with; remove that first."
    for store in owner.stores.values():
        attached = store.matrix if isinstance(store, (Weight, Bias)) else matrix
        if attached.weight == matrix.weight and (attached.pattern, attached.bias) != (matrix.pattern, matrix.bias):
            return (
                f"adapters are on its {matrix.weight} as {attached.pattern!r} with the bias {attached.bias!r}, and "
                f"{matrix.pattern!r} with {matrix.bias!r} has been registered since; glora.remove them first, or "
                f"register what they were attached by."
            )
    if matrix.weight not in tensors:
        return f"it has no parameter `{matrix.weight}` (pruning and the older weight_norm replace it); undo that first."
    if isinstance(layer, nn.Linear) and "bias" not in tensors and "bias" not in layer._parameters:
        return "it has no parameter `bias`, not even None (pruning replaces it); undo that first."
    if is_offloaded(layer, tensors):
        return (
            "accelerate has offloaded its weights; take that off (accelerate.hooks.remove_hook_from_submodules), "
            "attach or load, and offload then, with preload_module_classes=['ParametrizedLinear']."
        )
    kind = parametrize.type_before_parametrizations(layer)
    if kind.__module__.startswith("bitsandbytes."):
        return (
            f"it is bitsandbytes' {kind.__name__}, whose weight means nothing without the state that its own forward "
            f"keeps; quantise with torchao (Int8WeightOnlyConfig, IntxWeightOnlyConfig), or adapt a float copy."
        )
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            return f"its {name} is lazy; run one batch through the model first."
        if tensor.is_inference():
            return f"its {name} was made in inference mode, and can never train again; make the model outside of it."
        if name in (matrix.weight, matrix.bias) and tensor.dtype not in DTYPES:
            return (
                f"its {name} is {tensor.dtype}, which says nothing of scales (or is complex); quantise with torchao, "
                f"whose tensors know theirs, or adapt a float copy of the layer."
            )
        if is_quantised(tensor):
            reason = _unsupported_quantised(site, name, tensor)
            if reason is not None:
                return f"its {name} is quantised (a {type(tensor).__name__}), and {reason}"
        elif is_traceable_wrapper_subclass(tensor) and not is_tensor_parallel(layer, tensor):
            return f"its {name} is a {type(tensor).__name__}; {_before(tensor)}"
    reason = _kept_elsewhere(owner)
    if reason is not None:
        return reason
    shape = tuple(tensors[matrix.weight].shape)
    if tensors[matrix.weight].numel() == 0:
        return f"its {matrix.weight} is empty, {shape}; exclude it."
    if len(shape) != len(matrix.axes):
        return f"its {matrix.weight} has the shape {shape}, and {matrix.pattern!r} was registered for it; correct that."
    if site.has_own_bias and tensors[cast("str", matrix.bias)].shape != site.weight.shape[:-1]:
        return (
            f"its {matrix.bias} has the shape {tuple(tensors[cast('str', matrix.bias)].shape)}, where the matrix has "
            f"{tuple(site.weight.shape)}; register it without a bias."
        )
    for name, paths in ((matrix.weight, WEIGHT_PATHS), (matrix.bias or "", BIAS_PATHS)):
        if (id(layer), name) in ties and any(config.forms[path] != "none" for path in paths):
            return (
                f"its {name} is tied to {ties[id(layer), name]}, which would change with it; untie them (give this "
                f"layer a clone), or leave it out with exclude=."
            )
    if site.bias is not None and site.bias.has_frozen_prompt():
        return (
            "torch's removal has baked its weight in, and its bias still has adapters, which were trained beside the "
            "weight before; remove those of the bias too."
        )
    creates = config.create_bias and not site.has_own_bias and (config.C, config.E) != ("none", "none")
    if creates and isinstance(layer, nn.MultiheadAttention) and matrix.bias is not None:
        return (
            f"torch's fast paths take a MultiheadAttention with `{matrix.bias}` and its output projection, and the "
            f"layers around it, to have biases all together, so that one cannot be created here; leave out C and E, or "
            f"make it with bias=True."
        )
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq):
        return (
            "its max_norm writes into the weight at every call, or its scale_grad_by_freq rescales the gradient of the "
            "weight, which is frozen; make the embedding without them."
        )
    if config.rank_dropout and is_sharded(tensors[matrix.weight]):
        return "its weight is divided by parallelize_module, and rank dropout would differ by rank; use rank_dropout=0."
    if config.rank_dropout and not has_known_forward(layer):
        return "its forward is its own, and rank dropout acts in nn.Linear's; use rank_dropout=0."
    return None


def has_known_forward(layer: nn.Module) -> bool:
    """Whether the layer runs nn.Linear's or nn.Embedding's forward, in which rank dropout and a supernet draw."""
    # MultiheadAttention's output projection: its weight is read, and its forward never called.
    never_called = isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
    kind = parametrize.type_before_parametrizations(layer)
    is_known = has_linear_forward(kind) or has_embedding_forward(kind)
    return is_known and not never_called and "forward" not in vars(layer)


def _unsupported_quantised(site: Site, name: str, tensor: Tensor) -> str | None:
    """Why this quantised tensor cannot take paths, and what to do about it; None if it can (Note [Quantised])."""
    if name != site.matrix.weight or not site.matrix.is_linear:
        return "a linear layer's `weight` is all that can be; leave it out with exclude=."
    if not has_linear_forward(parametrize.type_before_parametrizations(site.module)):
        return "the layer's forward is its own, where nn.Linear's is needed; leave it out with exclude=."
    inputs = next((name for name in _ON_INPUTS if getattr(tensor, name, None) is not None), None)
    if inputs is not None:
        return f"it quantises or rescales its inputs too ({inputs}), where W0 alone may be; quantise weights only."
    if tensor.is_meta:
        return None
    try:
        shape = rows(tensor.detach(), slice(0, 1)).shape
    except Exception as error:
        return (
            f"a block of its rows cannot be dequantised ({type(error).__name__}: {str(error)[:100]}); quantise to a "
            f"kind that can be cut, as torchao's Int8WeightOnlyConfig and IntxWeightOnlyConfig make."
        )
    return None if shape == (1, tensor.shape[1]) else f"its first row dequantises to the shape {tuple(shape)}."


def unsupported_head(head: PlannedHead, ties: Ties) -> str | None:
    """Why this module, or one that is tied to it, cannot train as a whole, and what to do about it; None if it can.

    Args:
        head: the module.
        ties: of tensors that are not one Parameter.
    """
    reason = _unsupported_copy(head.owner, ties)
    if reason is not None:
        return reason
    for other, name in head.places:
        reason = _unsupported_copy(other, {})
        if reason is not None:
            return f"its copy is {join(other.path, name)}'s too, and there: {reason}"
    return None


def _unsupported_copy(owner: Owner, ties: Ties) -> str | None:
    module = owner.module
    reason = _kept_elsewhere(owner)
    if reason is not None:
        return reason
    if _is_foreign(owner, type(None)) or any(not isinstance(s, Head) for s in owner.stores.values()):
        return "it is parametrized already (by another adapter's paths, or by something else); exclude it there first."
    for name, tensor in owner.tensors.items():
        if is_lazy(tensor):
            return "it is lazy; run one batch through the model first."
        if tensor.is_inference():
            return f"its {name} was made in inference mode, and can never train again; make the model outside of it."
        if is_traceable_wrapper_subclass(tensor):
            return f"its {name} is a {type(tensor).__name__}; {_before(tensor)}"
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"its {name} is {tensor.dtype}, in which nothing trains; train a float copy of it (`.float()`)."
        if (id(module), name) in ties:
            return f"its {name} is tied to {ties[id(module), name]}, and a copy would not be; untie them first."
    return None


def _kept_elsewhere(owner: Owner) -> str | None:
    """Why a module's own tensors cannot be computed: it has them in a plain attribute too, and would read that."""
    own = {id(tensor): name for name, tensor in owner.tensors.items()}
    known = ("_parameters", "_buffers", "_flat_weights")  # the last: Note [Flat weights]
    for attribute, value in vars(owner.module).items():
        if isinstance(value, Tensor) or (attribute not in known and isinstance(value, (list, tuple, dict)) and value):
            kept = next((own[id(leaf)] for leaf in tree_leaves(value) if id(leaf) in own), None)
            if kept is not None:
                return (
                    f"it has its {kept} in its attribute `{attribute}` too, which would go on as the base model's; let "
                    f"it read {kept} by its name, or leave it as it is."
                )
    return None


def _before(tensor: Tensor) -> str:
    """What to do in place of adapting a tensor that is sharded or quantised already."""
    if isinstance(tensor, nn.Parameter) and hasattr(tensor, "full_tensor"):
        return "attach or load before fully_shard, and after parallelize_module where that divides it too."
    return "attach to a float copy of the layer, train, glora.merge, and quantise what is merged."


def _is_foreign(owner: Owner, foreign: type[object]) -> bool:
    """Whether something that is not ours, or adapters of this kind, parametrizes the module."""
    if "parametrizations" not in owner.module._modules:
        return False
    stores = owner.stores
    return any(
        name not in stores or isinstance(stores[name], foreign) or len(parametrization) > 1
        for name, parametrization in parametrizations_of(owner.module).items()
    )


# Note [Ties]
# Two tensors are tied when they are one Parameter or their memory overlaps. Adapting one would silently change the
# other (torch's removal writes into it) or silently untie them. Ranges of addresses tell (on the meta device, which has
# no addresses, ranges within one storage); two views that interleave without sharing an element count as tied too. One
# module reached by two paths is no tie.
def find_ties(walk: list[Owner], *, one_parameter: bool = True) -> Ties:
    """The tensors of the model that share memory with another module's, each with the path of one of those.

    Args:
        walk: the model's.
        one_parameter: whether a Parameter that stands in two places counts as tied to itself.
    """
    # Address space, first byte, byte behind the last; whose it is; which Parameter.
    spans: list[tuple[int, int, int, int, str, str, int]] = []
    for owner in walk:
        for name, held in owner.tensors.items():
            tensor = held if is_lazy(held) else storage_of(held)
            if is_lazy(tensor) or is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided:
                continue
            if tensor.numel():
                storage, size = tensor.untyped_storage(), tensor.element_size()
                address = storage.data_ptr()
                start = address + int(tensor.storage_offset()) * size
                reach = 1 + sum([(n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)])
                space = 0 if address else memory_of(tensor)
                which = id(held) if isinstance(held, nn.Parameter) and not one_parameter else 0
                spans.append((space, start, start + reach * size, id(owner.module), name, owner.path, which))
    ties: Ties = {}
    reaching: list[tuple[int, int, int, int, str, str, int]] = []
    for span in sorted(spans):
        reaching = [other for other in reaching if other[0] == span[0] and other[2] > span[1]]
        for other in [other for other in reaching if not span[6] or span[6] != other[6]]:
            ties.setdefault(span[3:5], join(other[5], other[4]))
            ties.setdefault(other[3:5], join(span[5], span[4]))
        reaching.append(span)
    return ties
