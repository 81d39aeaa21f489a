"""Each private name of torch that the library uses is there, and stands in one room."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import glora
from glora import torch_internals

LIBRARY = Path(glora.__file__).parent


def in_fsdp(name: str) -> bool:
    """Whether fully_shard's own source has the name; nothing of it is there before a process group is."""
    fsdp = pytest.importorskip("torch.distributed.fsdp._fully_shard")
    rooms = ("_fsdp_param", "_fsdp_param_group", "_fsdp_state", "_fully_shard")
    return any(name in inspect.getsource(getattr(fsdp, room)) for room in rooms)


def regions(*, use_reentrant: bool) -> list[tuple[bool, bool]]:
    """Of the runs of one checkpointed region: whether it is the second, and whether it is reentrant."""
    seen: list[tuple[bool, bool]] = []
    records: list[object] = []

    def region(x: torch.Tensor) -> torch.Tensor:
        (found,) = torch_internals.checkpointed_regions()
        seen.append((found.is_second_run, found.is_reentrant))
        records.append(found.record)
        return x.exp()

    checkpoint(region, torch.ones(1, requires_grad=True), use_reentrant=use_reentrant).backward()
    assert records[0] is records[1]
    return seen


FSDP = (
    "_get_fsdp_state",
    "_fsdp_param_group",
    "_module_info",
    "_register_state_dict_hooks",
    "_init_mp_dtypes",
    "_module_to_pre_save_state_dict_hook_handle",
    "_module_to_pre_load_state_dict_hook_handle",
)
NAMES: dict[str, Callable[[], bool]] = {
    "torch._compile._disable_dynamo": lambda: callable(torch_internals.not_compiled),
    "torch.utils._pytree": lambda: torch_internals.tree_leaves([1, (2, {"a": 3})]) == [1, 2, 3],
    "nn.Module._non_persistent_buffers_set": lambda: torch_internals.not_persistent(nn.Linear(1, 1)) == set(),
    "nn.Module._load_from_state_dict": lambda: callable(nn.Module._load_from_state_dict),
    "UntypedStorage._cdata": lambda: isinstance(torch_internals.memory_of(torch.ones(1)), int),
    "torch._C._are_functorch_transforms_active": lambda: not torch_internals.is_traced(),
    "torch._C._functorch.is_legacy_batchedtensor": lambda: not torch_internals.is_mapped(torch.ones(1)),
    "torch._C._current_graph_task_id": lambda: not torch_internals.in_backward(),
    "torch._C._autograd._top_saved_tensors_default_hooks": lambda: torch_internals.saved_tensors_hooks(False) is None,
    "torch.utils.checkpoint's frames": lambda: (
        regions(use_reentrant=False) == [(False, False), (True, False)]
        and regions(use_reentrant=True) == [(False, True), (True, True)]
    ),
    "Tensor._is_view": lambda: torch_internals.is_view(torch.ones(2)[:1]),
    "Tensor._version": lambda: torch_internals.writes_to(torch.ones(1).zero_()) == 1,
    "torch.autograd.forward_ad._current_level": lambda: not torch_internals.in_transform(),
    "torch.jit._trace.is_tracing": lambda: not torch_internals.is_tracing(),
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass": lambda: (
        not torch_internals.is_traceable_wrapper_subclass(torch.ones(1))
    ),
    "Reducer._get_zeros_like_grad_buckets": lambda: hasattr(
        torch._C._distributed_c10d.Reducer, "_get_zeros_like_grad_buckets"
    ),
    **{f"fully_shard: {name}": lambda name=name: in_fsdp(name) for name in FSDP},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_private_name_is_there(name: str) -> None:
    assert NAMES[name]()


def test_a_parametrization_has_the_attributes_that_torchs_constructor_gives_it() -> None:
    layer = glora.apply(nn.Linear(3, 2), config=glora.GLoRAConfig.glora())
    ours = layer.parametrizations.weight
    torchs = parametrize.ParametrizationList([nn.Identity()], nn.Parameter(torch.ones(2, 3)), unsafe=True)
    assert vars(ours).keys() == vars(torchs).keys()
    for name in ("unsafe", "is_tensor", "ntensors", "training"):
        assert getattr(ours, name) == getattr(torchs, name)


def private_names(file: Path) -> Iterator[str]:
    """Private names of torch in a file: imported, or reached from `torch`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == "torch" and any(part.startswith("_") and not part.startswith("__") for part in rest):
                yield name


def test_private_names_of_torch_stand_in_one_room() -> None:
    found = {str(file.relative_to(LIBRARY)): list(private_names(file)) for file in LIBRARY.rglob("*.py")}
    assert {file for file, names in found.items() if names} == {"torch_internals.py"}
