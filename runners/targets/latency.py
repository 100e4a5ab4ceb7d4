"""How long a file that ships takes, in the runtime that runs it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...objectives.measurement import Estimate

_SHORTEST = 2e-3  # seconds that one timing lasts at least


def latency(
    candidate: Callable[[NDArray[Any]], object],
    baseline: Callable[[NDArray[Any]], object],
    batch: NDArray[Any],
    baseline_ms: float | None = None,
    seconds: float = 0.5,
    clock: Callable[[], int] = time.thread_time_ns,
) -> tuple[Estimate, Estimate]:
    """`(milliseconds, ratio to the baseline)` of one run of `candidate` on `batch`, each with a 95% interval.

    Both are warmed up, then run in turns, so that a change of the machine's speed meets both alike. The estimate is the
    median of the ratios within pairs, its interval that of a median by order statistics. Milliseconds are the ratio
    times `baseline_ms` (this run's own median when None): one yardstick per study, because absolute times of a busy or
    virtual machine drift by a fifth while ratios hold to a few per cent. `clock` gives nanoseconds: the thread's own CPU
    time, which preemption by other programs does not reach, where this thread computes alone; else the wall clock.
    """
    one, other = partial(candidate, batch), partial(baseline, batch)
    for _ in range(5):
        one()
        other()
    start = time.perf_counter()
    other()
    # A run of microseconds is timed in a row of runs, so that the clock and the call of it do not count.
    runs = max(1, math.ceil(_SHORTEST / max(time.perf_counter() - start, 1e-7)))
    times: list[tuple[int, int]] = []
    end = time.perf_counter() + seconds
    while len(times) < 10 or (time.perf_counter() < end and len(times) < 2000):
        times.append((block(one, runs, clock), block(other, runs, clock)))
    pairs = np.array(times, dtype=np.float64) / runs
    ratio = median(pairs[:, 0] / np.maximum(pairs[:, 1], 1.0))
    scale = baseline_ms if baseline_ms is not None else float(np.median(pairs[:, 1])) / 1e6
    return Estimate(ratio.value * scale, ratio.low * scale, ratio.high * scale, ratio.n), ratio


def block(run: Callable[[], object], runs: int, clock: Callable[[], int]) -> int:
    """What the clock says of a row of runs, after one that does not count.

    That one finds another network's weights in the caches, which no user of the file would. (With it an int8 ResNet-18
    at 64 pixels came out at 0.31 of the float one's time, without it at 0.28.)
    """
    run()
    begin = clock()
    for _ in range(runs):
        run()
    return clock() - begin


def median(values: NDArray[np.float64]) -> Estimate:
    """The median with its distribution-free 95% interval (order statistics n/2 -+ 0.98 sqrt(n))."""
    ordered = np.sort(values)
    n = len(ordered)
    half = 0.98 * np.sqrt(n)
    low, high = max(0, int(np.floor(n / 2 - half))), min(n - 1, int(np.ceil(n / 2 + half)))
    return Estimate(float(np.median(ordered)), float(ordered[low]), float(ordered[high]), n)
