"""What a model holds, to be compared before and after."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.testing._internal.two_tensor import TwoTensor

import glora


def contents(tensor: Tensor) -> object:
    """The bytes of a tensor, where it has any."""
    if is_lazy(tensor) or tensor.is_meta or isinstance(tensor, TwoTensor):
        return None
    if hasattr(tensor, "full_tensor"):  # sharded
        return contents(tensor.full_tensor())
    if hasattr(tensor, "__tensor_flatten__"):  # quantised
        return [contents(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
    return tensor.detach().cpu().flatten().view(torch.uint8).tolist()


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that an adapter could change of a model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {
        "types": {path: type(module) for path, module in modules.items()},
        "attributes": {path: list(vars(module)) for path, module in modules.items()},
        "keys": list(model.state_dict()),
        "identities": {name: id(tensor) for name, tensor in tensors.items()},
        "flags": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "values": {name: contents(tensor) for name, tensor in tensors.items()},
    }


def values_apart(state: dict[str, object]) -> dict[str, object]:
    return {aspect: value for aspect, value in state.items() if aspect != "values"}


@contextmanager
def unchanged(model: nn.Module) -> Generator[None]:
    """Nothing in the model changes inside the `with` block."""
    before = snapshot(model)
    yield
    assert snapshot(model) == before


def clones(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same keys, in any order, and the same bits."""
    return first.keys() == second.keys() and all(
        tensor.dtype == second[key].dtype and torch.equal(tensor, second[key]) for key, tensor in first.items()
    )


def same_outputs(found: Tensor, wanted: Tensor) -> bool:
    """Whether two models of the same bits gave these, up to a few units in the last place.

    A product may round differently where a weight lies elsewhere in memory, as one does that was read from a file.
    """
    size = 8 * torch.finfo(wanted.dtype).eps * max(1.0, wanted.abs().max().item())
    return found.dtype == wanted.dtype and torch.allclose(found, wanted, rtol=0, atol=size)


def with_output(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """A copy of the state dict, and the output beside it."""
    return clones({"its output": model(x), **model.state_dict()})


def other_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: torch.randn_like(tensor).abs() if tensor.is_floating_point() else tensor + 3
        for key, tensor in tensors.items()
    }


def all_adapters(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {name: clones(glora.state_dict(model, name)) for name in glora.adapters(model)}


def identities(model: nn.Module) -> dict[tuple[str, str], int]:
    return {
        (name, key): id(parameter)
        for name in glora.adapters(model)
        for key, parameter in glora.named_parameters(model, name)
    }
