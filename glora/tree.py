"""Walking a model: its modules under their own paths, and its tensors as they were before any adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from glora.layer import adapters_of, parametrizations_of
from glora.parametrization import Adapters

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclass(frozen=True)
class Found:
    """A module of a model: its first path, every path that reaches it, and the module."""

    path: str
    aliases: tuple[str, ...]
    module: nn.Module = field(repr=False)


def find(model: nn.Module) -> list[Found]:
    """Every module of the model once, in order, with the paths that reach it; adapters' own modules left out.

    Paths are the model's own: the components that wrappers add (`module` of DistributedDataParallel, DataParallel and
    AveragedModel, `_orig_mod` of torch.compile) are dropped.
    """
    reached: dict[int, tuple[nn.Module, list[str]]] = {}
    for path, module in _walk(model, ""):
        reached.setdefault(id(module), (module, []))[1].append(path)
    return [Found(aliases[0], tuple(aliases), module) for module, aliases in reached.values()]


def wraps(module: nn.Module, child: str) -> bool:
    """Whether `module` is a wrapper and `child` the attribute that holds what it wraps."""
    return child in _WRAPPED or (child == "module" and isinstance(module, _WRAPPERS))


def join(path: str, name: str) -> str:
    """`path.name`, and `name` alone at the root."""
    return f"{path}.{name}" if path else name


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    for name, child in module._modules.items():
        if child is not None and not (name == "parametrizations" and adapters_of(module)):
            yield from _walk(child, path if wraps(module, name) else join(path, name))


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and persistent buffers by name, those of the base model where adapters are on them."""
    tensors: dict[str, Tensor] = {
        name: tensor
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and name not in module._non_persistent_buffers_set
    }
    for name in adapters_of(module):
        tensors[name] = parametrizations_of(module)[name].original
    return tensors


def adapted(model: nn.Module) -> Iterator[tuple[Found, dict[str, Adapters]]]:
    """The modules that carry adapters, each with tensor name to adapters."""
    for found in find(model):
        adapters = adapters_of(found.module)
        if adapters:
            yield found, adapters
