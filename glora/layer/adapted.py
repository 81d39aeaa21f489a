"""The class that a module has while it is adapted: its tensors computed, its forward by the cheapest kernel."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from glora.kernels import select
from glora.layer import routed
from glora.layer.heads import Head, HeadCopy
from glora.layer.keys import adopt_plain_keys, drop_upgraded_keys
from glora.layer.parametrization import (
    Adapters,
    Bias,
    Scales,
    Stacks,
    Weight,
    biases_of,
    live_stacks,
)
from glora.layer.reading import once, reading_once
from glora.matrices import LINEAR, TRANSPOSED, Matrix, has_linear_forward, is_transposed_linear

# Note [One class per base class]
# torch's `register_parametrization` gives every module a class of its own, with a property that knows its module. Two
# things follow that we cannot have. Twelve equal blocks are twelve classes, and torch.compile recompiles for each until
# it gives up. And a deep copy shares that class: taking a parametrization off the copy deletes the property under the
# original. So all adapted modules of one base class share a class of ours. It has no property: a parametrized tensor's
# place in `_parameters` holds None, which keeps the order of the parameters, and `__getattr__` computes it. A tensor
# that somebody puts into that place counts (torch.func.functional_call does, and `glora.merged`).
#
# torch's functions work on it as on their own. The property that they set on the class, and delete from it, is not
# taken up by `_AdaptedType`; all else that they do is done to the instance.


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

    Whatever its base class has against being extended is raised here.
    """
    base = parametrize.type_before_parametrizations(module)
    found = _classes.get(base)
    if found is None:
        found = _classes[base] = _make_class(base)
    return found


def read(module: nn.Module, name: str) -> Tensor:
    """The tensor `name` of an adapted module, as its attribute gives it."""
    return cast("Tensor", getattr(module, name))


def _make_class(base: type[nn.Module]) -> type[nn.Module]:
    if TYPE_CHECKING:  # a type checker takes no class that is known only at run time
        base = nn.Module

    # A base class may have a metaclass of its own (abc).
    meta = _AdaptedType if type(base) is type else type("_AdaptedType", (_AdaptedType, type(base)), {})

    class Parametrized(base, metaclass=meta):
        _glora_adapted = True

        def __getattr__(self, name: str) -> Any:
            lists = vars(self).get("_modules", {}).get("parametrizations")
            if lists is None or name not in lists._modules:
                return super().__getattr__(name)
            return _attribute(self, cast("Stacks", lists._modules), name)

        def __setattr__(self, name: str, value: object) -> None:
            lists = vars(self).get("_modules", {}).get("parametrizations")
            if lists is not None and name in lists._modules:
                _assign(self, name, value)
            else:
                super().__setattr__(name, cast("Any", value))

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
            super().register_parameter(name, param)
            _keep_frozen(self, name, param)

        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any) -> None:
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

    own, at_once = cast("tuple[Any, Any]", (reading_once(base.forward), None))
    if has_linear_forward(base):
        matrix = TRANSPOSED if is_transposed_linear(base) else LINEAR
        own, at_once = _linear_forward(matrix), _linear_at_once(matrix)

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return routed.call(self, own, at_once, args, kwargs) if routed.open_covers else own(self, *args, **kwargs)

    Parametrized.forward = forward
    Parametrized.__name__ = Parametrized.__qualname__ = f"Parametrized{base.__name__}"
    Parametrized.__doc__ = base.__doc__
    Parametrized.__module__ = base.__module__
    return Parametrized


def _linear_forward(matrix: Matrix) -> Callable[[nn.Module, Tensor], Tensor]:
    """nn.Linear's forward for a class that holds its weight so, by the cheapest kernel."""

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        lists, dropout = self._modules.get("parametrizations"), self.training
        stacks = {} if lists is None else cast("Stacks", lists._modules)
        scales = _scales(self, stacks)
        if not input.is_meta and any(stack.original.is_meta for stack in stacks.values()):
            raise RuntimeError(
                f"An adapted layer's tensors must be where its input is, {input.device}; they are on the meta device. "
                f"If accelerate has offloaded them, give its cpu_offload, disk_offload or dispatch_model "
                f"preload_module_classes=[{type(self).__name__!r}] (to serve: it trains nothing that is offloaded); "
                f"else give the model memory first (to_empty, and load)."
            )
        bias = _tensor(self, stacks, "bias", scales, dropout)
        stack, store = stacks.get("weight"), _weight_alone(self, stacks, matrix)
        if store is None:
            W = cast("Tensor", _tensor(self, stacks, "weight", scales, dropout))
            return F.linear(input, matrix.read(W), bias)
        return select.linear(input, matrix.read(cast("Any", stack).original), bias, store.factors(scales, dropout))

    return forward


def _linear_at_once(matrix: Matrix) -> Callable[..., Tensor | None]:
    """The same forward for samples of several adapters; None where it has to be run for one adapter after the other."""

    def forward(self: nn.Module, input: Tensor, *, acting: Sequence[Scales], owner: Tensor) -> Tensor | None:
        stacks, dropout = live_stacks(self), self.training
        stack, store = stacks.get("weight"), _weight_alone(self, stacks, matrix)
        if store is None:
            return None
        W0 = matrix.read(cast("Any", stack).original)
        groups = [store.factors(scales, dropout) for scales in acting]
        if not select.can_mix(input, W0, groups):
            return None
        biases = [_tensor(self, stacks, "bias", scales, dropout) for scales in acting]
        return select.linear_per_sample(input, W0, biases, groups, owner)

    return forward


def _weight_alone(module: nn.Module, stacks: Stacks, matrix: Matrix) -> Weight | None:
    """What adapts the weight, where it is all that computes the weight and sees it as this matrix."""
    stack, placed = stacks.get("weight"), module._parameters.get("weight")
    store = None if stack is None or placed is not None or len(stack) > 1 else stack._modules["0"]
    return store if isinstance(store, Weight) and store.matrix.pattern == matrix.pattern else None


def _scales(module: nn.Module, stacks: Stacks) -> Scales:
    """What acts on the module: looked up once for all of its tensors (Note [Never torn])."""
    for stack in stacks.values():
        first = stack._modules["0"]
        if isinstance(first, Adapters):
            active = first.acting.of_a_call()
            return routed.scales_of(module, active) if routed.open_covers else active
    return {}


def _tensor(module: nn.Module, stacks: Stacks, name: str, scales: Scales, dropout: bool) -> Tensor | None:
    """A tensor of an adapted layer: the plain one where one stands in its place, else the computed one."""
    plain = module._parameters[name] if name in module._parameters else module._buffers.get(name)
    return plain if plain is not None or name not in stacks else _compute(module, stacks, name, scales, dropout)


def _attribute(module: nn.Module, stacks: Stacks, name: str) -> Tensor | None:
    """A tensor as whoever reads it has it."""
    if isinstance(stacks[name]._modules["0"], Head):
        return _tensor(module, stacks, name, _scales(module, stacks), False)
    value = once(module, name, lambda: _tensor(module, stacks, name, _scales(module, stacks), False))
    if value is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _remember_frozen(module, name, value)
    return value


def _compute(module: nn.Module, stacks: Stacks, name: str, scales: Scales, dropout: bool) -> Tensor:
    stack = stacks[name]
    first, *others = cast("list[nn.Module]", stack._modules.values())
    try:
        if isinstance(first, Weight):
            value = first(stack.original, scales, dropout)
        elif isinstance(first, Bias):
            value = first(stack.original, _frozen_weight(module, stacks, first), scales, dropout)
        elif isinstance(first, Head):
            value = first(stack.original, scales)
        else:  # somebody else's, on a tensor that we left plain
            return cast("Callable[[], Tensor]", stack)()
        for other in others:
            value = other(value)
        return value
    except AttributeError as error:
        # Python would take it for the attribute's own and say that there is no attribute `name`.
        raise RuntimeError(f"Computing `{name}` of an adapted {type(module).__name__} failed: {error}") from error


def _frozen_weight(module: nn.Module, stacks: Stacks, bias: Bias) -> Tensor:
    """W0, also where torch's removal has put W' in its place (Note [Bias needs the frozen weight])."""
    name = bias.matrix.weight
    if bias.frozen_weight is not None:
        return bias.frozen_weight
    if name in stacks and isinstance(stacks[name]._modules["0"], Weight):
        return stacks[name].original
    return read(module, name)


# Note [Removal order]
# `remove_parametrizations(layer, "weight")` reads `layer.weight` under no_grad and at once does `original.set_(W')`:
# what was W0 is gone. If the layer's bias has a C, that read attaches an alias of W0 (no bytes are copied) to the W'
# that it returns; both are freed together. `_keep_frozen`, which torch reaches through `register_parameter`, takes the
# alias from there. With `leave_parametrized=False` what was read, if anything, is not what now stands in the parameter:
# the parameter itself is W0, and goes on being read. Removal of the bias needs none of this.
def _remember_frozen(module: nn.Module, name: str, value: Tensor) -> None:
    original = live_stacks(module)[name].original
    for bias in _prompted_biases(module, name) if value is not original else ():
        vars(value)["glora_frozen"] = original.detach()
        bias.last_read = weakref.ref(value)


def _keep_frozen(module: nn.Module, name: str, restored: Tensor | None) -> None:
    for bias in _prompted_biases(module, name) if restored is not None else ():
        value = bias.last_read() if bias.last_read is not None else None
        if value is not None and value.untyped_storage()._cdata == cast("Tensor", restored).untyped_storage()._cdata:
            bias.frozen_weight = vars(value)["glora_frozen"]


def _prompted_biases(module: nn.Module, weight: str) -> list[Bias]:
    """The biases of the module that multiply this weight, and have not kept what it was."""
    biases = biases_of(module).values()
    return [b for b in biases if b.matrix.weight == weight and b.has_prompt() and b.frozen_weight is None]


def _assign(module: nn.Module, name: str, value: object) -> None:
    """Let a head bind a buffer of its own anew, as some modules do in training; refuse any other assignment."""
    stack = live_stacks(module)[name]
    store = stack._modules["0"]
    if isinstance(store, Head) and not isinstance(stack.original, nn.Parameter) and isinstance(value, Tensor):
        acting = store.acting_copy(_scales(module, live_stacks(module)))
        if acting is None:
            stack.original = value
        else:
            cast("HeadCopy", acting).value = value  # a buffer is never shared
        return
    raise RuntimeError(
        f"`{name}` of this {type(module).__name__} is computed from glora adapters and cannot be assigned (as tying "
        f"and quantising do). Assign before glora.apply, or after glora.merge(model) or glora.remove(model); the "
        f"frozen tensor itself is `parametrizations.{name}.original`."
    )
