"""The class that a module gets while it is adapted, and the reading of its tensors."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Generator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from glora import ways
from glora.parametrization import Adapters, Bias, Head, Weight

# Note [One class per base class]
# torch's `register_parametrization` gives every module a class of its own, with a property that knows its module. Two
# things follow that we cannot have. Twelve equal blocks are twelve classes, and torch.compile recompiles for each until
# it gives up. And a deep copy shares that class: taking a parametrization off the copy deletes the property under the
# original. So after torch has registered, the module's class is replaced by one that all adapted modules of its base
# class share. Its property asks the instance: parametrized, it computes; not, it reads the plain tensor. It is right
# for every instance in every state, so nobody may take it off: torch's `delattr(type(module), name)` does nothing, and
# its `setattr` of one more property puts ours. What torch's `remove_parametrizations` does besides (restore the tensor,
# restore `__bases__[0]` as the class after the last one) works on the instance, as ever.


class _SharedClass(type):
    def __setattr__(cls, name: str, value: object) -> None:
        if not isinstance(value, property):
            super().__setattr__(name, value)
        elif not isinstance(vars(cls).get(name), property):
            super().__setattr__(name, _tensor_property(name))

    def __delattr__(cls, name: str) -> None:
        if not any(isinstance(vars(base).get(name), property) for base in cls.__mro__):
            super().__delattr__(name)


_shared_classes: weakref.WeakValueDictionary[type[nn.Module], type[nn.Module]] = weakref.WeakValueDictionary()


def original_order(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's own tensors in the order that they had before any was parametrized."""
    lists = module._modules.get("parametrizations")
    order = (*module._parameters, *module._buffers)
    return cast("tuple[str, ...]", getattr(lists, "original_order", order))


def share_class(module: nn.Module, order: tuple[str, ...]) -> None:
    """Give a module that torch has just parametrized the class shared by all adapted modules of its base class.

    Args:
        module: the module.
        order: what `original_order` was before; a removal restores it.
    """
    vars(module._modules["parametrizations"])["original_order"] = order
    if isinstance(type(module), _SharedClass):
        return
    shared = _shared_class(parametrize.type_before_parametrizations(module))
    for name in _live(module):
        setattr(shared, name, _tensor_property(name))
    torchs = type(module)
    module.__class__ = shared
    for name, value in list(vars(torchs).items()):
        if isinstance(value, property):  # its closure holds the module, in a cycle that only the collector would end
            delattr(torchs, name)


def prepare_class(module: nn.Module) -> type[nn.Module]:
    """The shared class that the module would get; whatever its base class has against being extended is raised here."""
    return _shared_class(parametrize.type_before_parametrizations(module))


def has_shared_class(module: nn.Module) -> bool:
    """Whether the module's class is a shared one itself, and not one that somebody (FSDP) has put on top."""
    return "_glora_shared" in vars(type(module))


def _shared_class(base: type[nn.Module]) -> type[nn.Module]:
    shared = _shared_classes.get(base)
    if shared is None:
        shared = _shared_classes[base] = _make_class(base)
    return shared


def _tensor_property(name: str) -> property:
    def get(module: nn.Module) -> Any:
        return read(module, name)

    # On a module of the class that keeps something plain under this name: as if there were no property.
    def set_plain(module: nn.Module, value: object) -> None:
        vars(module)[name] = value

    def delete_plain(module: nn.Module) -> None:
        del vars(module)[name]

    return property(get, set_plain, delete_plain)


def _make_class(base: type[nn.Module]) -> type[nn.Module]:
    if TYPE_CHECKING:  # a type checker takes no class that is known only at run time
        base = nn.Module

    # A base class may have a metaclass of its own (abc).
    meta = _SharedClass if type(base) is type else type("_SharedClass", (_SharedClass, type(base)), {})

    class Parametrized(base, metaclass=meta):
        _glora_shared = True

        def __setattr__(self, name: str, value: object) -> None:
            if name in _live(self):
                _refuse_assignment(self, name)
            super().__setattr__(name, cast("Any", value))

        def __getstate__(self) -> dict[str, Any]:
            raise RuntimeError(
                "A model with parametrized tensors cannot be pickled, and this one has glora adapters attached. Save "
                "the adapters alone with glora.save(model, directory) or torch.save(glora.state_dict(model)), or bake "
                "them in first with glora.merge(model)."
            )

        def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
            restored = name not in self._parameters and "parametrizations" in self._modules
            super().register_parameter(name, param)
            if restored:
                _after_removal(self, name)

        def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
            restored = name not in self._buffers and "parametrizations" in self._modules
            super().register_buffer(name, tensor, persistent)
            if restored:
                _restore_order(cast("nn.ModuleDict", self._modules["parametrizations"]), self._buffers)

        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any) -> None:
            _adopt_plain_keys(self, state_dict, prefix)
            before = set(state_dict)
            super()._load_from_state_dict(state_dict, prefix, *rest, **named)  # pyright: ignore
            unexpected: list[str] = named["unexpected_keys"] if "unexpected_keys" in named else rest[3]
            # A module may bring an old checkpoint up to date on the way, under plain keys (BatchNorm does).
            for name in _live(self):
                if (key := f"{prefix}{name}") in state_dict and key not in before:
                    # What it brings is what it reads, the active adapter's; the base keeps its own.
                    del state_dict[key]
                    state_dict.setdefault(f"{prefix}parametrizations.{name}.original", _live(self)[name].original)
                    unexpected[:] = [other for other in unexpected if other != key]

    if not hasattr(base, "__deepcopy__"):

        def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
            # The default would ask __getstate__, which refuses.
            replica = type(self).__new__(type(self))
            memo[id(self)] = replica
            replica.__dict__ = copy.deepcopy(self.__dict__, memo)
            return replica

        Parametrized.__deepcopy__ = deepcopy  # pyright: ignore[reportAttributeAccessIssue]

    if has_linear_forward(base):
        Parametrized.forward = _linear_forward  # pyright: ignore[reportAttributeAccessIssue]

    Parametrized.__name__ = Parametrized.__qualname__ = f"Parametrized{base.__name__}"
    Parametrized.__doc__ = base.__doc__
    Parametrized.__module__ = base.__module__
    return Parametrized


def has_linear_forward(base: type[nn.Module]) -> bool:
    """Whether calling a module of this class is nn.Linear's own forward."""
    return vars(next(c for c in base.__mro__ if "forward" in vars(c)))["forward"] is vars(nn.Linear)["forward"]


def _linear_forward(self: nn.Module, input: Tensor) -> Tensor:
    bias = read(self, "bias", dropout=self.training)
    stack = _live(self).get("weight")
    store = None if stack is None else next(iter(stack))
    if stack is None or not isinstance(store, Weight) or not _short_way_is_open(stack):
        return F.linear(input, cast("Tensor", read(self, "weight", dropout=self.training)), bias)
    updates = store.updates(self.training)
    way = ways.choose(updates, input.numel() // max(1, input.shape[-1]), torch.is_grad_enabled())
    if way == "whole" or (way == "blocks" and _in_transform()):
        return F.linear(input, _compute(self, "weight", self.training), bias)
    return ways.linear(way, input, stack.original, bias, updates)


def _short_way_is_open(stack: parametrize.ParametrizationList) -> bool:
    """Whether ours is alone on a plain weight that asks for no gradient, and nobody wants W' kept (Note [Ways])."""
    W0 = stack.original
    plain = type(W0) is nn.Parameter or type(W0) is Tensor
    return len(stack) == 1 and plain and not W0.requires_grad and not parametrize._cache_enabled  # pyright: ignore


def _in_transform() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, for which blocks have no rule."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0  # pyright: ignore


def read(module: nn.Module, name: str, *, dropout: bool = False) -> Tensor | None:
    """The tensor `name` of an adapted module: computed where it is parametrized, the plain one where it is not.

    Args:
        module: a module of a shared class.
        name: the tensor's name.
        dropout: whether rank dropout acts; True in the layer's own forward in training alone.
    """
    if name not in _live(module):
        for tensors in (module._parameters, module._buffers):
            if name in tensors:
                return tensors[name]
        for plain in (vars(module), *(vars(base) for base in type(module).__mro__[1:])):
            if name in plain and not isinstance(plain[name], property):
                return plain[name]
        raise AttributeError(f"'{type(module).__name__}' object has no attribute '{name}'")
    try:
        if parametrize._cache_enabled and not dropout:  # pyright: ignore
            value = _read_cached(module, name)
        else:
            value = _compute(module, name, dropout)
    except AttributeError as error:
        # Python would take it for the property's own and say that there is no attribute `name`.
        raise RuntimeError(f"Computing `{name}` of an adapted {type(module).__name__} failed: {error}") from error
    if name == "weight" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _remember_frozen(module, value)
    return value


def _compute(module: nn.Module, name: str, dropout: bool) -> Tensor:
    stack = _live(module)[name]
    original = stack.original
    first = next(iter(stack))
    if isinstance(first, Adapters) and first.routed is not None:
        raise RuntimeError(
            f"Inside glora.route an adapted layer can only be called, since each sample has its own `{name}`; that of "
            f"{first.routed!r} was read (nn.MultiheadAttention and fused layers read a layer's weight and never call "
            f"it). Leave it out of the adapters (exclude=), or run each adapter's samples with glora.activate."
        )
    if isinstance(first, Weight):
        value = first(original, dropout)
    elif isinstance(first, Bias):
        value = first(original, _frozen_weight(module, first), dropout)
    elif isinstance(first, Head):
        value = first(original)
    else:  # somebody else's, on a tensor that we left plain
        return stack()
    for other in list(stack)[1:]:
        value = other(value)
    return value


# Note [Cached]
# Under `parametrize.cached()` torch keeps each value by the id of the module that was parametrized first, which is the
# original's also in a deep copy, and until the block ends. We keep ours in the same dictionary, which torch empties, by
# the module itself, with the `active` it was computed for: a copy has its own, and a switch of adapters is seen.
def _read_cached(module: nn.Module, name: str) -> Tensor:
    cache = cast("dict[object, Any]", parametrize._cache)
    active = _active(module)
    held = cache.get((module, name))
    if held is None or list(map(id, held[0])) != list(map(id, active)):
        held = cache[(module, name)] = (active, _compute(module, name, False))
    return held[1]


def _active(module: nn.Module) -> list[object]:
    return [adapters.active for adapters in adapters_of(module).values()]


def _frozen_weight(module: nn.Module, bias: Bias) -> Tensor:
    """W0, also where torch's removal has put W' in its place (Note [Bias needs the frozen weight])."""
    if bias.frozen_weight is not None:
        return bias.frozen_weight
    lists = _live(module)
    if "weight" in lists and isinstance(next(iter(lists["weight"])), Weight):
        return lists["weight"].original
    return cast("Tensor", read(module, "weight"))


# Note [Removal order]
# `remove_parametrizations(layer, "weight")` reads `layer.weight` under no_grad and at once does `original.set_(W')`:
# what was W0 is gone. If the layer's bias has a C, that read leaves a second tensor on W0's storage (no bytes are
# copied) on the W' that it returns, so that it dies with it; `_after_removal`, which torch reaches through
# `register_parameter`, takes it from there. With `leave_parametrized=False` what was read, if anything, is not what now
# stands in the parameter: the parameter itself is W0, and goes on being read. Removal of the bias needs none of this.
def _remember_frozen(module: nn.Module, value: Tensor) -> None:
    adapters = adapters_of(module)
    bias = adapters.get("bias")
    if "weight" in adapters and isinstance(bias, Bias) and bias.has_prompt() and bias.frozen_weight is None:
        original = parametrizations_of(module)["weight"].original
        if value is not original:
            vars(value)["glora_frozen"] = original.detach()
            bias.last_read = weakref.ref(value)


def _after_removal(module: nn.Module, name: str) -> None:
    _restore_order(cast("nn.ModuleDict", module._modules["parametrizations"]), module._parameters)
    bias = adapters_of(module).get("bias")
    if name != "weight" or not isinstance(bias, Bias) or not bias.has_prompt() or bias.frozen_weight is not None:
        return
    restored = cast("Tensor", module._parameters["weight"])
    value = bias.last_read() if bias.last_read is not None else None
    if value is not None and value.untyped_storage()._cdata == restored.untyped_storage()._cdata:
        bias.frozen_weight = vars(value)["glora_frozen"]


def _restore_order(lists: nn.ModuleDict, tensors: MutableMapping[str, Any]) -> None:
    # Torch puts a restored tensor last; the order of `parameters()` is what optimizers' state dicts go by.
    order = cast("tuple[str, ...]", vars(lists)["original_order"])
    for name in [*(n for n in order if n in tensors), *(n for n in list(tensors) if n not in order)]:
        tensors[name] = tensors.pop(name)


def _adopt_plain_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Let a layer that is given the base model's plain keys, and no adapter keys, load them and keep its adapters."""
    own = f"{prefix}parametrizations."
    adapters = adapters_of(module)
    plain = [name for name in adapters if f"{prefix}{name}" in state_dict]
    bias = adapters.get("bias")
    if any(key.startswith(own) for key in state_dict) or not (plain or f"{prefix}weight" in state_dict):
        return
    if isinstance(bias, Bias) and bias.frozen_weight is not None and f"{prefix}weight" in state_dict:
        # A clone: with assign=True the layer's weight becomes the given tensor itself, and may be trained.
        state_dict[f"{own}bias.0.frozen_weight"] = state_dict[f"{prefix}weight"].clone()
    for name in plain:
        state_dict[f"{own}{name}.original"] = state_dict.pop(f"{prefix}{name}")
    created = isinstance(bias, Bias) and bias.created
    demanded = {f"{own}{name}.original" for name in adapters if not (name == "bias" and created)}
    for key, tensor in (
        cast("nn.ModuleDict", module._modules["parametrizations"]).state_dict(prefix=own, keep_vars=True).items()
    ):
        if key not in demanded:
            state_dict.setdefault(key, tensor)


def _refuse_assignment(module: nn.Module, name: str) -> None:
    raise RuntimeError(
        f"`{name}` of this {type(module).__name__} is computed from glora adapters and cannot be assigned (as tying "
        f"weights does). Assign before glora.apply, or after glora.merge(model) or glora.remove(model); the frozen "
        f"tensor itself is `parametrizations.{name}.original`."
    )


def _live(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Tensor name to what parametrizes it now."""
    lists = module.__dict__.get("_modules", {}).get("parametrizations")
    if not isinstance(lists, nn.ModuleDict):
        return {}
    return cast("dict[str, parametrize.ParametrizationList]", lists._modules)


# Note [Merged for a while]
# Inside `glora.merged` a module is plain: its class, its keys and its tensors are those of a merged one, and what
# parametrized it is held here. It is no attribute of the module, so that a deep copy made inside is a plain merged
# model for good, and not one that waits for the end of a block that it is not in.
set_aside: weakref.WeakKeyDictionary[nn.Module, nn.ModuleDict] = weakref.WeakKeyDictionary()


def parametrizations_of(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Tensor name to what parametrizes it, set aside or not (Note [Merged for a while])."""
    if set_aside and module in set_aside:
        return cast("dict[str, parametrize.ParametrizationList]", set_aside[module]._modules)
    return _live(module)


def adapters_of(module: nn.Module) -> dict[str, Adapters]:
    """Tensor name to the adapters on it, for the tensors of this very module that glora parametrizes."""
    found: dict[str, Adapters] = {}
    for name, stack in parametrizations_of(module).items():
        first = next(iter(stack))
        if isinstance(first, Adapters):
            found[name] = first
    return found


def bake_for_a_while(module: nn.Module) -> None:
    """Make an adapted module plain, with its computed tensors in new Parameters, until `unbake`."""
    values = {name: cast("Tensor", read(module, name)).detach() for name in _live(module)}
    adapters = adapters_of(module)
    lists = set_aside[module] = cast("nn.ModuleDict", module._modules.pop("parametrizations"))
    vars(lists)["shared_class"] = type(module)  # the registry holds it weakly
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        _put_plain(module, name, value, with_created=bool(adapters[name].active))
    for tensors in (module._parameters, module._buffers):
        _restore_order(lists, tensors)


def _put_plain(module: nn.Module, name: str, value: Tensor, *, with_created: bool) -> None:
    """Put a tensor in under `name`, as a frozen Parameter or a buffer, as its original is."""
    adapters = adapters_of(module)[name]
    if not isinstance(parametrizations_of(module)[name].original, nn.Parameter):
        module._buffers[name] = value
    elif isinstance(adapters, Bias) and adapters.created and not with_created:
        module._parameters[name] = None
    else:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)


@contextmanager
def base_for_a_while(module: nn.Module) -> Generator[None]:
    """Within `bake_for_a_while`: the base model's tensors in place of the computed ones, inside the `with` block."""
    before = dict(module._parameters), dict(module._buffers)
    for name, stack in parametrizations_of(module).items():
        _put_plain(module, name, stack.original.detach(), with_created=False)
    try:
        yield
    finally:
        for tensors, old in ((module._parameters, before[0]), (module._buffers, before[1])):
            for name, tensor in old.items():
                now = tensors.get(name)
                if tensor is not None and now is not None and tensor is not now:  # where the model was moved meanwhile
                    tensor.data = tensor.data.to(now.device, now.dtype)
                cast("dict[str, Tensor | None]", tensors)[name] = tensor


def unbake(module: nn.Module) -> None:
    """Undo `bake_for_a_while`: the adapters and the very originals again, where the module has been moved to."""
    lists = set_aside[module]
    for name, stack in cast("dict[str, parametrize.ParametrizationList]", lists._modules).items():
        original = stack.original
        tensors = module._parameters if name in module._parameters else module._buffers
        plain = cast("Tensor | None", tensors.pop(name, None))
        if plain is not None and (plain.device, plain.dtype) != (original.device, original.dtype):
            stack.to(plain.device, plain.dtype)
    module._modules["parametrizations"] = lists
    lists.train(module.training)
    module.__class__ = vars(lists).pop("shared_class")
    del set_aside[module]
