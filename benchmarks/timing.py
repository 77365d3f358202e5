"""Interleaved rounds: every contestant once a round, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Step = Callable[[], object]
# Seconds of one call, from running the step so many times.
Clock = Callable[[Step, int], float]

# A turn lasts at least this long, so that the timer's cost and a neighbour's cache lines hardly count.
TURN_SECONDS = 0.002
MOST_CALLS = 1000
WARM_UP_CALLS = 2
LEAST_ROUNDS = 5
MOST_ROUNDS = 200


class Quantiles(NamedTuple):
    """Of the seconds one call took."""

    p20: float
    p50: float
    p80: float

    @property
    def spread(self) -> float:
        """How far the rounds lie apart, as a share of the median."""
        return (self.p80 - self.p20) / self.p50


def quantiles(seconds: Sequence[float]) -> Quantiles:
    """p20, p50 and p80, interpolated between rounds."""
    # statistics wants two points; one round twice is that round.
    points = [*seconds, *seconds] if len(seconds) == 1 else seconds
    deciles = statistics.quantiles(points, n=10, method="inclusive")
    return Quantiles(deciles[1], deciles[4], deciles[7])


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Inside, torch computes on so many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_clock(step: Step, calls: int) -> float:
    """Seconds of one call by the wall clock."""
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


class CudaClock:
    """Times by CUDA events, every call with its input out of the second-level cache.

    flush: a buffer larger than that cache. cuda: `torch.cuda`, or a stand-in.
    """

    def __init__(self, flush: Any, cuda: Any = torch.cuda) -> None:
        self.flush, self.cuda = flush, cuda

    def __call__(self, step: Step, calls: int) -> float:
        """Seconds of one call on the device."""
        events = []
        for _ in range(calls):
            # Flushing also keeps the device busy while the host prepares the launches that are timed.
            self.flush.zero_()
            start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            events.append((start, end))
        self.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3 / calls


def clock_for(device: str) -> Clock:
    """The clock for steps on `device`."""
    if torch.device(device).type == "cpu":
        return cpu_clock
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return CudaClock(torch.empty(4 * cache, dtype=torch.int8, device=device))


def race(
    steps: Mapping[str, Step],
    clock: Clock,
    *,
    rounds: int | None = None,
    seconds: float = 1.0,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, list[float]]:
    """Per name, the seconds of one call in each round, after a warm-up.

    Every step gets one turn a round. It ends after `rounds`, or, if that is None, after `seconds`, though not
    before LEAST_ROUNDS. `progress` is told the share done.
    """
    calls = {}
    for name, step in steps.items():
        fastest = min(clock(step, 1) for _ in range(WARM_UP_CALLS))
        calls[name] = max(1, min(MOST_CALLS, round(TURN_SECONDS / max(fastest, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    order = random.Random(0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(rounds or MOST_ROUNDS):
            # Merely rotated, everyone would always have the same predecessor, and a tenth hangs on the caches it left.
            order.shuffle(names)
            for name in names:
                samples[name].append(clock(steps[name], calls[name]))
            elapsed = time.perf_counter() - start
            progress((turn + 1) / rounds if rounds else min(1.0, elapsed / max(seconds, 1e-9)))
            if not rounds and elapsed >= seconds and turn + 1 >= LEAST_ROUNDS:
                break
    finally:
        if collecting:
            gc.enable()
    return samples
