"""The class that a module has while it is adapted: its tensors are computed, and what would go wrong is refused."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from glora.layer import routed
from glora.layer.computed import adapter_weights_in_call, caching_reads, freeze_prompts, read_attribute
from glora.layer.convolution import convolution_forward
from glora.layer.forward import embedding_forward, linear_forward, per_sample_forward
from glora.layer.heads import Head, HeadCopy
from glora.layer.keys import adopt_plain_keys, drop_upgraded_keys, refuse_kept_apart
from glora.layer.parametrization import Bias, live_parametrizations
from glora.layer.recurrent import flat_weights, follow_tensors
from glora.matrices import (
    LINEAR,
    TRANSPOSED,
    has_convolution_forward,
    has_embedding_forward,
    has_linear_forward,
    is_transposed_linear,
)
from glora.precision import DTYPES

# Note [One class per base class]
# torch's `register_parametrization` gives every module a class of its own, with a property for each tensor. Two things
# go wrong. Twelve equal blocks have twelve classes, and torch.compile recompiles for each until it gives up. And a deep
# copy shares the class: removing a parametrization from the copy deletes the property of the original.
#
# So all adapted modules of one base class share one class of ours. It has no property: a parametrized tensor's entry in
# `_parameters` is None, which keeps the order of the parameters, and `__getattr__` computes the value. A tensor in that
# entry wins over the computed one (torch.func.functional_call and `glora.merged` put one there).
#
# torch's own functions work on this class. They set a property on the class and delete it later; `_AdaptedType` ignores
# both. Everything else they change is the instance's.


class _AdaptedType(type):
    def __setattr__(cls, name: str, value: object) -> None:
        if not isinstance(value, property):
            super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        if name in vars(cls):
            super().__delattr__(name)


_classes: weakref.WeakValueDictionary[type[nn.Module], type[nn.Module]] = weakref.WeakValueDictionary()


def adapted_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module has, or would get, while it is adapted.

    Raises what subclassing the base class raises.
    """
    # torch's function takes ten times as long to say that there are none.
    plain = "parametrizations" not in module._modules
    base = type(module) if plain else parametrize.type_before_parametrizations(module)
    adapted = _classes.get(base)
    if adapted is None:
        adapted = _classes[base] = _make_class(base)
    return adapted


def _make_class(base: type[nn.Module]) -> type[nn.Module]:
    if TYPE_CHECKING:  # a type checker takes no class that is known only at run time
        base = nn.Module

    # A base class may have a metaclass of its own (abc).
    meta = _AdaptedType if type(base) is type else type("_AdaptedType", (_AdaptedType, type(base)), {})

    class Parametrized(base, metaclass=meta):
        _glora_adapted = True

        def __getattr__(self, name: str) -> Any:
            parametrizations = live_parametrizations(self)
            if name in parametrizations:
                return read_attribute(self, parametrizations, name)
            value: Any = base.__getattr__(self, name)  # no super(): the class may change meanwhile (Note [Never torn])
            if value is None and name in (parametrizations := live_parametrizations(self)):
                return read_attribute(self, parametrizations, name)
            return value

        def __setattr__(self, name: str, value: object) -> None:
            if name in live_parametrizations(self):
                _assign(self, name, value)
            elif name == "qconfig" and value is not None:
                raise RuntimeError(
                    f"torch.ao quantises layers of the types that it knows, and not a {type(self).__name__}, which "
                    f"glora adapters are on. Bake them in first with glora.merge(model) (a copy of the model, say), or "
                    f"quantise inside glora.merged(model)."
                )
            else:
                base.__setattr__(self, name, cast("Any", value))

        def __getstate__(self) -> dict[str, Any]:
            raise RuntimeError(
                "A model with parametrized tensors cannot be pickled, and this one has glora adapters attached. Save "
                "the adapters alone with glora.save(model, directory) or torch.save(glora.state_dict(model)), or bake "
                "them in first with glora.merge(model)."
            )

        def __prepare_scriptable__(self) -> nn.Module:
            raise RuntimeError(
                "torch.jit.script cannot compile tensors that are computed from glora adapters. Bake them in first "
                "with glora.merge(model) (a copy of the model, say), or use torch.export or torch.jit.trace."
            )

        def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
            if "." in name:  # torch's parallelize_module registers what `named_parameters` lists
                raise RuntimeError(
                    f"Tensor parallelism (parallelize_module) cannot divide tensors that glora adapters are on, here "
                    f"{name!r}. Call parallelize_module on the plain model, and then glora.apply or glora.load."
                )
            tensor = name.rpartition("_")[0]
            stack = live_parametrizations(self).get(tensor) if tensor else None
            if stack is not None and name != getattr(stack._modules["0"], "matrix", LINEAR).bias:  # taken off first
                _refuse_split(self, tensor, name)
            super().register_parameter(name, param)
            freeze_prompts(self, name, param)
            follow_tensors(self)

        def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
            def checked(tensor: Tensor) -> Tensor:
                moved = fn(tensor)
                if moved.is_floating_point() and moved.dtype not in DTYPES:
                    raise RuntimeError(
                        f"Adapted modules hold numbers in float64, float32, bfloat16 or float16, and this "
                        f"{type(self).__name__} was to be cast to {moved.dtype} with its adapters (layerwise casting "
                        f"does that). Cast what has no adapter, or after glora.merge(model)."
                    )
                return moved

            return cast("Any", super())._apply(checked, recurse)

        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any) -> None:
            refuse_kept_apart(named["local_metadata"] if "local_metadata" in named else rest[0])
            adopt_plain_keys(self, state_dict, prefix)
            before = set(state_dict)
            super()._load_from_state_dict(state_dict, prefix, *rest, **named)  # pyright: ignore
            unexpected: list[str] = named["unexpected_keys"] if "unexpected_keys" in named else rest[3]
            drop_upgraded_keys(self, state_dict, prefix, before, unexpected)

    if not hasattr(base, "__deepcopy__"):

        def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
            # The default would ask __getstate__, which refuses.
            memo[id(self)] = replica = type(self).__new__(type(self))
            replica.__dict__ = copy.deepcopy(self.__dict__, memo)
            return replica

        Parametrized.__deepcopy__ = deepcopy  # pyright: ignore[reportAttributeAccessIssue]

    if issubclass(base, nn.RNNBase):  # Note [Flat weights]
        type.__setattr__(Parametrized, "_flat_weights", property(flat_weights, _ignore))
        Parametrized._init_flat_weights = follow_tensors  # pyright: ignore[reportAttributeAccessIssue]

    if has_linear_forward(base):
        matrix = TRANSPOSED if is_transposed_linear(base) else LINEAR
        run, run_per_sample = linear_forward(matrix), per_sample_forward(matrix)
    elif has_embedding_forward(base):
        run, run_per_sample = embedding_forward(base), None
    elif has_convolution_forward(base):
        run, run_per_sample = convolution_forward(base), None
    else:
        run, run_per_sample = caching_reads(base.forward), None

    @functools.wraps(run)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if routed.active_routes:
            return routed.call(self, run, run_per_sample, args, kwargs)
        return run(self, *args, **kwargs)

    Parametrized.forward = forward
    Parametrized.__name__ = Parametrized.__qualname__ = f"Parametrized{base.__name__}"
    Parametrized.__doc__ = base.__doc__
    Parametrized.__module__ = base.__module__
    return Parametrized


def _refuse_split(module: nn.Module, tensor: str, name: str) -> None:
    """Refuse what puts new parameters (`weight_orig`, `weight_g`) in the place of an adapted tensor.

    weight_norm has deleted the tensor's entry by now: it is put back where torch's own modules have it.
    """
    if tensor not in module._parameters and tensor not in module._buffers:
        module._parameters[tensor] = None
        if not isinstance(live_parametrizations(module)[tensor]._modules["0"], Bias):  # a weight stands first
            for name_after in [each for each in module._parameters if each != tensor]:
                module._parameters[name_after] = module._parameters.pop(name_after)
    raise RuntimeError(
        f"`{tensor}` of this {type(module).__name__} is computed from glora adapters, and `{name}` cannot take its "
        f"place (as pruning and the older weight_norm do). Call that before glora.apply where it leaves a parameter, "
        f"or after glora.merge(model); torch.nn.utils.parametrizations go on top of adapters."
    )


def _ignore(*_: object) -> None:
    """What torch would set is computed."""


def _assign(module: nn.Module, name: str, value: object) -> None:
    """Let a head bind a buffer of its own anew, as some modules do in training; refuse any other assignment."""
    parametrizations = live_parametrizations(module)
    parametrization = parametrizations[name]
    head, is_buffer = parametrization._modules["0"], not isinstance(parametrization.original, nn.Parameter)
    if isinstance(head, Head) and is_buffer and isinstance(value, Tensor):
        acting = head.acting_copy(adapter_weights_in_call(module, parametrizations))
        if acting is None:
            parametrization.original = value
        else:
            cast("HeadCopy", acting).value = value  # a buffer is never shared
        return
    raise RuntimeError(
        f"`{name}` of this {type(module).__name__} is computed from glora adapters and cannot be assigned (as tying "
        f"and quantising do). Assign before glora.apply, or after glora.merge(model) or glora.remove(model); the "
        f"frozen tensor itself is `parametrizations.{name}.original`."
    )
