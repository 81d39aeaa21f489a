"""A process group of this process alone: what an engine does, without what several ranks add."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore


@pytest.fixture
def one_rank() -> Generator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
