"""Every test starts from the same seed; hypothesis draws the same examples at every run, but in the profile `fresh`.

The plain command draws the first few; .ci/run draws three times as many, the same ones first.
"""

import os
from collections.abc import Generator

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, register_random, settings
from torch._C._distributed_c10d import HashStore

settings.register_profile(
    "pinned",
    derandomize=True,
    deadline=None,  # first calls import and compile; time is measured in benchmarks/
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("short", settings.get_profile("pinned"), max_examples=20)
settings.register_profile("long", settings.get_profile("pinned"), max_examples=1000)
# A few new examples at every run; one that fails is printed as what `@reproduce_failure` takes.
settings.register_profile(
    "fresh", settings.get_profile("pinned"), derandomize=False, database=None, print_blob=True, max_examples=20
)
# Under `mutmut run` (pyproject.toml) the first failing example is enough: none is made smaller.
settings.register_profile(
    "mutation",
    settings.get_profile("pinned"),
    max_examples=15,
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


class TorchRandom:
    """Torch's generator, for hypothesis: each example starts from the same seed, and fails again wherever it is run."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH = TorchRandom()  # hypothesis refers to it weakly
register_random(TORCH)

# Tables as they are where there is room; tests/test_text.py has narrower ones.
os.environ["COLUMNS"] = "200"

# The matrices are small: more threads are slower.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_rank() -> Generator[None]:
    """A process group of this process alone: what an engine does, without what several ranks add."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
