"""Peak memory of one training step, measured in a process of its own."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

# Note [A fresh process each]
# The high-water mark of a process never falls, the allocator keeps what was freed, and each library's import leaves its
# own: two measurements in one process would not be of the same thing. So each runs in a new one, which first imports
# and runs everything once at a tiny size (the floor), then builds (built), then makes the step (peak).
#
# On Linux `ru_maxrss` is no use for this: a child starts with its parent's mark, even after `exec`. `VmHWM` starts
# anew, and writing 5 to `clear_refs` brings it down to what is in use now, so that no peak of an import or of building
# hides the step's. Elsewhere `ru_maxrss` has to do, and can only be too high.
#
# glibc hands freed blocks of up to 32 MiB back to the system late or never, by a threshold that moves with what was
# freed before. The mark then tells of the allocator's habits more than of the step: up to three times of what torch had
# allocated. A fixed threshold holds it to what is in use.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def peak_of_step(module: str, name: str, size: Any, tiny: Any, device: str) -> dict[str, float]:
    """Peak memory of a training step in MiB; on a CPU in a fresh process (Note [A fresh process each]).

    Args:
        module: of a function `prepare_step(name, size, device)` that builds a step and returns it as a callable.
        name: the peer.
        size: a dataclass of numbers and texts; `prepare_step` gets it as a dict.
        tiny: such a size for a step of next to nothing.
        device: "cpu" (resident memory), or a CUDA device (torch's allocator).

    Returns:
        `peak_step_MiB`: at most during the step, beyond what was in use before it. `peak_whole_MiB`: at most during the
        step, beyond an equal process with a tiny layer: weights, adapters, activations.

    Raises:
        RuntimeError: the process failed, with its last lines of output.
    """
    orders = {"module": module, "name": name, "size": asdict(size), "tiny": asdict(tiny), "device": device}
    if torch.device(device).type == "cuda":  # the allocator's mark can be brought down, and is of tensors alone
        gc.collect()
        return _measure(**orders, threads=torch.get_num_threads())
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(orders | {"threads": torch.get_num_threads()})]
    root, environment = Path(__file__).parents[1], _ENVIRONMENT | dict(os.environ)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=environment)
    if done.returncode:
        raise RuntimeError(f"The memory of {name}, {size} could not be measured: {done.stderr.strip()[-600:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _measure(
    module: str, name: str, size: dict[str, Any], tiny: dict[str, Any], device: str, threads: int
) -> dict[str, float]:
    torch.set_num_threads(threads)
    make: Callable[..., Callable[[], object]] = importlib.import_module(module).prepare_step
    on_cuda = torch.device(device).type == "cuda"
    mark, reset = (_cuda_mark, torch.cuda.reset_peak_memory_stats) if on_cuda else (_resident_mark, _reset_resident)
    small = make(name, tiny, device)
    small()
    small()
    del small
    reset()
    floor = mark()
    step = make(name, size, device)
    reset()
    built = mark()
    step()
    step()  # with the optimizer's state of the first, and memory laid out by it
    peak = mark()
    return {"peak_step_MiB": (peak - built) / 2**20, "peak_whole_MiB": (peak - floor) / 2**20}


def _cuda_mark() -> int:
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _resident_mark() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return mark if sys.platform == "darwin" else mark * 1024


def resident() -> int:
    """Bytes of memory that this process holds now; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


def _reset_resident() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the mark stays where it was
        return


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="For benchmarks.memory.peak_of_step alone.")
    parser.add_argument("orders")
    print(json.dumps(_measure(**json.loads(parser.parse_args().orders))))
