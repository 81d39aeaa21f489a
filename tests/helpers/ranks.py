"""Two processes on this machine that talk through gloo."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

WORLD = 2


def on_two_ranks(test: Callable[..., None], *given: Any) -> None:
    """`test(rank, *given)` in two processes of one process group; an exception in either is raised here."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "glora"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = (test, Path(folder, "init").as_uri(), given)
        start_processes(_run, arguments, nprocs=WORLD, start_method="forkserver")


def _run(rank: int, test: Callable[..., None], init: str, given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=WORLD)
    try:
        test(rank, *given)
    finally:
        dist.destroy_process_group()


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, gathered where they are sharded: a collective."""
    return {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in tensors.items()}


def differences(tensors: list[Tensor]) -> float:
    """The largest difference between the ranks' tensors."""
    own = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    all_of_them = [torch.empty_like(own) for _ in range(WORLD)]
    dist.all_gather(all_of_them, own)
    return max((own - other).abs().max().item() for other in all_of_them)
