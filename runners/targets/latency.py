"""The latency of a network relative to a baseline, with an interval."""

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
    """The milliseconds of one run of `candidate` on `batch`, and the ratio to `baseline`, each with a 95% interval.

    Both are warmed up, then run in turns, so that a change of the machine's speed affects both. The estimate is the
    median of the ratios within pairs, with the interval of a median by order statistics. Milliseconds are the ratio
    times the baseline's: absolute times on a busy or virtual machine drift by 20%, while ratios stay within a few per
    cent.

    Args:
        candidate: The network that is timed.
        baseline: The network that it is compared with.
        batch: The inputs of each run.
        baseline_ms: The baseline's milliseconds, one number for a whole study; None: the median of this measurement.
        seconds: How long to measure; at least 10 and at most 2000 pairs are timed.
        clock: Gives nanoseconds: the CPU time of the thread, which preemption by other programs does not change, for
            networks that compute in the calling thread alone; else the wall clock.

    Returns:
        `(milliseconds, ratio to the baseline)`
    """
    one, other = partial(candidate, batch), partial(baseline, batch)
    for _ in range(5):
        one()
        other()
    start = time.perf_counter()
    other()
    # Several short runs are timed together, so that the cost of reading the clock is negligible.
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
    """The nanoseconds of several runs in a row, after one that is not timed.

    The caches hold the other network's weights when the first run begins, which is not so in production. (With the
    first run, an int8 ResNet-18 at 64 pixels took 0.31 of the float network's time, without it 0.28.)

    Args:
        run: Runs the network once.
        runs: How many runs are timed.
        clock: Gives nanoseconds.
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
