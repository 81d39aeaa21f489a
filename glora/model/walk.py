"""Walking a model: its modules under their own paths, and its tensors as they were before any adapter."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from glora.layer.parametrization import Acting, AdapterWeights, Bias, Store, Weight, is_adapted, own_tensors, stores_of
from glora.matrices import Matrix, matrices_of

Model = TypeVar("Model", bound=nn.Module)

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_original_module"}


@dataclass(frozen=True)
class Owner:
    """A module of a model, as it was when the model was walked.

    Attributes:
        path: the first path that reaches it.
        aliases: every path that reaches it.
        module: the module.
        tensors: its own parameters and persistent buffers by name; the base model's where adapters are on them.
        stores: tensor name to the adapters on it.
    """

    path: str
    aliases: tuple[str, ...]
    module: nn.Module = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False)
    stores: dict[str, Store] = field(repr=False)

    @property
    def acting(self) -> Acting:
        """Which of its adapters act; it must have some."""
        return next(iter(self.stores.values())).acting

    def keep_scales(self, adapter_weights: AdapterWeights) -> None:
        """Let these adapters act, as far as the module has them; the flags follow."""
        names = self.adapter_names
        self.acting.adapter_weights = {name: scale for name, scale in adapter_weights.items() if name in names}
        for store in self.stores.values():
            store.match_flags()

    @property
    def adapter_names(self) -> set[str]:
        """The adapters that it has, on any of its tensors."""
        return {name for store in self.stores.values() for name in store.parts()}


@dataclass(frozen=True)
class Site:
    """A matrix of a model's module, that adapters can go onto (Note [Matrices]).

    Attributes:
        path: the first path that reaches it.
        aliases: every path that reaches it.
        named: its module.
        matrix: how the module holds it.
    """

    path: str
    aliases: tuple[str, ...]
    named: Owner
    matrix: Matrix

    @property
    def module(self) -> nn.Module:
        """The module that holds it."""
        return self.named.module

    @property
    def key(self) -> tuple[int, str]:
        """What it is told from others by: its module's id and its tensor's name."""
        return id(self.named.module), self.matrix.weight

    @property
    def weight(self) -> Tensor:
        """The base model's weight as a matrix `(out, in)`, or a batch of them."""
        return self.matrix.read(self.named.tensors[self.matrix.weight])

    @property
    def bias(self) -> Bias | None:
        """The adapters on its bias; None where there are none."""
        return cast("Bias | None", self.named.stores.get(self.matrix.bias or ""))

    @property
    def has_own_bias(self) -> bool:
        """Whether the base model has a bias for it; one that `create_bias=True` made does not count."""
        return not self.bias.created if self.bias is not None else self.matrix.bias in self.named.tensors


def sites(modules: Iterable[Owner]) -> list[Site]:
    """Every matrix that adapters can go onto, of these modules."""
    return [site_of(named, matrix) for named in modules for matrix in matrices_of(named.module, named.tensors)]


def adapted_sites(named: Owner) -> list[Site]:
    """The matrices of a module that adapters are on, on the weight or on its bias, as they were attached."""
    stores = [store for store in named.stores.values() if isinstance(store, (Weight, Bias))]
    return [site_of(named, matrix) for matrix in dict.fromkeys(store.matrix for store in stores)]


def site_of(named: Owner, matrix: Matrix) -> Site:
    """A matrix under the paths of its module."""
    return Site(matrix.path(named.path), tuple(map(matrix.path, named.aliases)), named, matrix)


def owners(model: nn.Module) -> list[Owner]:
    """Every module of the model once, in order, with the paths that reach it; adapters' own modules left out.

    Paths are the model's own: the components that wrappers add (`module` of DistributedDataParallel, DataParallel and
    AveragedModel, `_orig_mod` of torch.compile, `_forward_module` of Fabric) are dropped.
    """
    reached: dict[int, tuple[nn.Module, list[str]]] = {}
    _walk(model, (), reached)
    found: list[Owner] = []
    for module, paths in reached.values():
        adapters = stores_of(module) if is_adapted(module) else {}
        found.append(Owner(paths[0], tuple(paths), module, own_tensors(module), adapters))
    return found


def _walk(module: nn.Module, parts: tuple[str, ...], reached: dict[int, tuple[nn.Module, list[str]]]) -> None:
    reached.setdefault(id(module), (module, []))[1].append(".".join(parts))
    for name, child in module._modules.items():
        if child is not None and not (name == "parametrizations" and is_adapted(module)):
            _walk(child, parts if wraps(module, name) else (*parts, name), reached)


def adapted_owners(model: nn.Module) -> list[Owner]:
    """The modules that carry adapters."""
    return [named for named in owners(model) if named.stores]


def wraps(module: nn.Module, child: str) -> bool:
    """Whether `module` is a wrapper and `child` the attribute that holds what it wraps."""
    return child in _WRAPPED or (child == "module" and isinstance(module, _WRAPPERS))


# Note [All or nothing]
# What changes a model prepares everything first, and then swaps objects that are all there. Should that still be cut
# off (no memory, Ctrl-C), every module gets back the attributes, and every parameter the flag, that it had: all that
# was swapped are entries of these dictionaries. Tensors are made outside of inference mode, since one that was made
# inside could never be trained.
@contextmanager
def all_or_nothing(model: nn.Module) -> Generator[None]:
    """Inside the `with` block the model changes; if an exception ends the block, it is as before."""
    before = [(module, module.__class__, _copy(vars(module))) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    acting = [(m.acting, m.acting.adapter_weights) for m in model.modules() if isinstance(m, Store)]
    try:
        with torch.inference_mode(False):
            yield
    except BaseException:
        for module, kind, attributes in before:
            _write_back(vars(module), attributes)
            module.__class__ = kind
        for shared, adapter_weights in acting:
            shared.adapter_weights = adapter_weights
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad = flag  # requires_grad_ refuses lazy parameters
        raise


def _copy(attributes: dict[str, Any]) -> dict[str, Any]:
    return {key: value.copy() if isinstance(value, dict) else value for key, value in attributes.items()}


def _write_back(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    for key in [key for key in attributes if key not in before]:
        del attributes[key]
    for key, value in before.items():
        now = attributes.get(key)
        if isinstance(value, dict) and isinstance(now, dict):  # the same dictionary: others may hold it
            cast("dict[Any, Any]", now).clear()
            cast("dict[Any, Any]", now).update(cast("dict[Any, Any]", value))
        else:
            attributes[key] = value
