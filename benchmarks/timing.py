"""Wall time of several callables side by side."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

# Note [Interleaved]
# `torch.utils.benchmark.Timer.blocked_autorange` measures one callable to its end, then the next. What changes with
# time (the clock's frequency, heat, other programs) then falls on whichever ran at that moment, and a ratio of two can
# be off by more than what it is to show. Here every callable runs once in each round, and a ratio is the median of the
# rounds' own ratios. Each round begins with the next callable, so that none is always first. What is taken over from
# `blocked_autorange` is that a block of many calls is timed where one call is too short for the clock.
#
# None of this helps where threads have to wait for a core: with as many threads as cores and another program beside
# them, every parallel region waits for a slice of the scheduler's, and times become multiples of several milliseconds.
# Measure on an idle machine, or with fewer threads than cores.

_BLOCK_SECONDS = 2e-3


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over the rounds.

    Attributes:
        samples: each round's seconds, in the order of the rounds, which several callables share.
        number: calls timed together in a round.
    """

    samples: tuple[float, ...] = field(repr=False)
    number: int

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    def ratio(self, other: Timing) -> tuple[float, float, float]:
        """How many times as long as `other` this one took, round by round: low quartile, median and high quartile."""
        ratios = [mine / theirs for mine, theirs in zip(self.samples, other.samples, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, median, high


def interleaved(
    callables: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 5.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time callables side by side (Note [Interleaved]); CUDA work by events, in the order of the stream.

    Args:
        callables: name to callable.
        seconds: for all of them together, warm-up left out; exceeded where `min_rounds` take longer.
        min_rounds: rounds at least, 2 or more.
        max_rounds: rounds at most.
        device: "cpu", or a CUDA device.
        clock: on a CPU; `time.process_time` on a machine that is busy, with one thread.

    Returns:
        Name to Timing, in the order of `callables`.
    """
    block = _cuda_block if torch.device(device).type == "cuda" else partial(_cpu_block, clock=clock)
    numbers = {name: _number(call, block) for name, call in callables.items()}
    samples: dict[str, list[float]] = {name: [] for name in callables}
    order = list(callables)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for round_number in range(max_rounds):
            if round_number >= min_rounds and time.perf_counter() > end:
                break
            first = round_number % len(order)
            for name in order[first:] + order[:first]:
                samples[name].append(block(callables[name], numbers[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(samples[name]), numbers[name]) for name in order}


def _number(call: Callable[[], object], block: Callable[[Callable[[], object], int], float]) -> int:
    block(call, 1)  # warm-up: allocations, kernel choice, lazy imports
    cached_in_call = min(block(call, 1), block(call, 1)) if block(call, 1) < 0.1 else _BLOCK_SECONDS
    return max(1, min(1000, math.ceil(_BLOCK_SECONDS / max(cached_in_call, 1e-9))))


def _cpu_block(call: Callable[[], object], number: int, clock: Callable[[], float]) -> float:
    begin = clock()
    for _ in range(number):
        call()
    return (clock() - begin) / number


def _cuda_block(call: Callable[[], object], number: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(number):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / number
