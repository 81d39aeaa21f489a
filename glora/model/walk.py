"""Walking a model: its modules under their own paths, and their tensors as they were before any adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar, cast

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from glora.layer.parametrization import Acting, Bias, Store, Weight, is_adapted, own_tensors, stores_of
from glora.matrices import Matrix, matrices_of

Model = TypeVar("Model", bound=nn.Module)

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_original_module"}


@dataclass(frozen=True)
class Owner:
    """A module of a model: what owns tensors.

    `tensors` and `stores` are read once and kept: after a change ask `stores_of(module)`.

    Attributes:
        path: the first path that reaches it.
        aliases: every path that reaches it.
        module: the module.
    """

    path: str
    aliases: tuple[str, ...]
    module: nn.Module = field(repr=False)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Its own parameters and persistent buffers by name; the base model's where adapters are on them."""
        return own_tensors(self.module)

    @cached_property
    def stores(self) -> dict[str, Store]:
        """Tensor name to the adapters on it."""
        return stores_of(self.module)

    @property
    def acting(self) -> Acting:
        """Which of its adapters act; it must have some."""
        return next(iter(self.stores.values())).acting

    @property
    def adapter_names(self) -> set[str]:
        """The adapters that it has, on any of its tensors."""
        return {name for store in self.stores.values() for name in store.parts()}

    @property
    def place(self) -> str:
        """Its path, for messages: the root has none."""
        return self.path or "the model itself"


@dataclass(frozen=True)
class Site:
    """A matrix of a model's module, that adapters can go onto (Note [Matrices]).

    Attributes:
        path: the first path that reaches it.
        aliases: every path that reaches it.
        owner: its module.
        matrix: how the module holds it.
    """

    path: str
    aliases: tuple[str, ...]
    owner: Owner
    matrix: Matrix

    @property
    def module(self) -> nn.Module:
        """The module that holds it."""
        return self.owner.module

    @property
    def key(self) -> tuple[int, str]:
        """Its identity: its module's id and its tensor's name."""
        return id(self.owner.module), self.matrix.weight

    @cached_property
    def weight(self) -> Tensor:
        """The base model's weight as a matrix `(out, in)`, or a batch of them."""
        return self.matrix.read(self.owner.tensors[self.matrix.weight])

    @property
    def bias(self) -> Bias | None:
        """The adapters on its bias; None where there are none."""
        return cast("Bias | None", self.owner.stores.get(self.matrix.bias or ""))

    @cached_property
    def has_own_bias(self) -> bool:
        """Whether the base model has a bias for it; one that `create_bias=True` made does not count."""
        bias = self.bias
        return not bias.created if bias is not None else self.matrix.bias in self.owner.tensors


def sites(walk: Iterable[Owner]) -> list[Site]:
    """Every matrix that adapters can go onto, of these modules."""
    return [site_of(owner, matrix) for owner in walk for matrix in matrices_of(owner.module, owner.tensors)]


def adapted_sites(owner: Owner) -> list[Site]:
    """The matrices of a module that adapters are on, on the weight or on its bias, as they were attached."""
    stores = [store for store in owner.stores.values() if isinstance(store, (Weight, Bias))]
    return [site_of(owner, matrix) for matrix in dict.fromkeys(store.matrix for store in stores)]


def site_of(owner: Owner, matrix: Matrix) -> Site:
    """A matrix under the paths of its module."""
    return Site(matrix.path(owner.path), tuple(map(matrix.path, owner.aliases)), owner, matrix)


def owners(model: nn.Module) -> list[Owner]:
    """Every module of the model once, in order, with the paths that reach it; adapters' own modules left out.

    Paths are the model's own: the components that wrappers add (`module` of DistributedDataParallel, DataParallel and
    AveragedModel, `_orig_mod` of torch.compile, `_forward_module` of Fabric) are dropped.

    Raises:
        ValueError: something that is no module.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        found = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ValueError(f"model must be a torch.nn.Module; found {found}. Pass the model itself, an instance.")
    reached: dict[int, tuple[nn.Module, list[str]]] = {}
    _walk(model, "", reached)
    return [Owner(paths[0], tuple(paths), module) for module, paths in reached.values()]


def _walk(module: nn.Module, path: str, reached: dict[int, tuple[nn.Module, list[str]]]) -> None:
    reached.setdefault(id(module), (module, []))[1].append(path)
    adapted = "parametrizations" in module._modules and is_adapted(module)
    for name, child in module._modules.items():
        if child is not None and not (adapted and name == "parametrizations"):
            below = path if wraps(module, name) else f"{path}.{name}" if path else name
            _walk(child, below, reached)


def adapted_owners(model: nn.Module) -> list[Owner]:
    """The modules that carry adapters."""
    return [owner for owner in owners(model) if owner.stores]


def wraps(module: nn.Module, child: str) -> bool:
    """Whether `module` is a wrapper and `child` the attribute that holds what it wraps."""
    return child in _WRAPPED or (child == "module" and isinstance(module, _WRAPPERS))
