"""Files evaluated as fast as this machine can, with the same predictions.

One network with a thread per core is the obvious way, and rarely the fastest: small networks gain more from
several images in flight, each on a core of its own, and every network has a batch size that fits the caches. `fastest`
tries the ways on real files and images at the start of a study, and drops each whose outputs differ from the obvious
way's by more than rounding, or in a single score.

What was tried and left out: bfloat16 in torch is up to 1.4 times as fast on float networks and changes one prediction
in some hundred; `torch.compile` takes longer to compile a candidate than to evaluate it. And neither of them runs the
file that ships.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import TaskError
from ..objectives.paired import FIRST
from .files import packing
from .targets.target import Network
from .task import Task, scores

# Hears of the scores of the first samples; what it raises ends an evaluation.
Watch = Callable[[NDArray[np.float64]], None]
BATCHES = (16, 32, 64, 128, 256)
_TRIAL = 0.15  # seconds that the obvious way may take for the images on which the ways are compared


@dataclass(frozen=True)
class EvaluationPlan:
    """`workers` batches in flight, each on `threads` threads, of `batch` images (0: as the task's batches come)."""

    workers: int = 1
    threads: int = 1
    batch: int = 0

    def describe(self) -> str:
        """For people: `2 x 64 images at a time, 1 thread each`, or `a batch at a time, 2 threads`."""
        images = f"{self.batch} images" if self.batch else "a batch"
        each = f"{self.threads} thread{'s' * (self.threads > 1)}{' each' * (self.workers > 1)}"
        return f"{f'{self.workers} x ' if self.workers > 1 else ''}{images} at a time, {each}"


def obvious() -> EvaluationPlan:
    """A thread per core, the task's own batches."""
    return EvaluationPlan(1, cores())


def cores() -> int:
    """The cores that this process may use."""
    return max(1, min(len(os.sched_getaffinity(0)), torch.get_num_threads()))


def predictions(
    network: Network, batches: Iterable[tuple[Tensor, Tensor]], workers: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """`(outputs, targets)` of a network, batch by batch and in order; raises `ExportFailed` when it does not run."""

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(network(x.contiguous().numpy()))

    if workers == 1:
        for x, y in batches:
            yield run(x), y
        return
    stream = iter(batches)
    with ThreadPoolExecutor(workers) as pool:
        # A few ahead, not all: the images may not fit into memory.
        waiting = [(pool.submit(run, x), y) for x, y in itertools.islice(stream, 2 * workers)]
        while waiting:
            future, y = waiting.pop(0)
            outputs = future.result()
            waiting += [(pool.submit(run, x), y) for x, y in itertools.islice(stream, 1)]
            yield outputs, y


def evaluate(
    network: Network,
    task: Task,
    batches: Iterable[tuple[Tensor, Tensor]],
    plan: EvaluationPlan | None = None,
    watch: Watch | None = None,
) -> NDArray[np.float64]:
    """The task's metric of an exported network, sample by sample.

    watch: hears of the scores so far after 256, 512, 1024, ... samples, and may raise what ends the evaluation.
    """
    plan = plan or EvaluationPlan()
    found: list[NDArray[np.float64]] = []
    seen, look = 0, FIRST
    for outputs, targets in predictions(network, rebatched(batches, plan.batch), plan.workers):
        found.append(scores(task, outputs, targets))
        seen += len(outputs)
        if watch and seen >= look:
            watch(np.concatenate(found))
            while look <= seen:
                look *= 2
    if not found:
        raise TaskError(f"task {task.name!r}: there are no samples to score")
    return np.concatenate(found)


def rebatched(batches: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same samples in the same order in batches of `size`; with 0 as they come.

    >>> parts = [(torch.zeros(3, 2), torch.zeros(3)), (torch.zeros(2, 2), torch.zeros(2))]
    >>> [len(x) for x, _ in rebatched(parts, 4)]
    [4, 1]
    """
    if not size:
        yield from batches
        return
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    held = 0
    for x, y in batches:
        xs, ys, held = [*xs, x], [*ys, y], held + len(x)
        if held < size:
            continue
        joined_x, joined_y = (xs[0], ys[0]) if len(xs) == 1 else (torch.cat(xs), torch.cat(ys))
        whole = held - held % size
        for start in range(0, whole, size):
            yield joined_x[start : start + size], joined_y[start : start + size]
        xs, ys, held = [joined_x[whole:]], [joined_y[whole:]], held - whole
    if held:
        yield torch.cat(xs), torch.cat(ys)


def fastest(
    files: Sequence[bytes],
    task: Task,
    batches: Iterable[tuple[Tensor, Tensor]],
    load: Callable[[bytes, int], Network],
    seconds: float = _TRIAL,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[EvaluationPlan, float]:
    """The fastest way to evaluate packed files like these, and how many times as fast as the obvious way it is.

    load: of the target that runs them.

    seconds: how long the obvious way may take for all the files together, which decides how many of the images are
    used; all the ways together take some twenty times as long. A way counts only if it is faster by a twentieth, its
    outputs agree with the obvious way's to 1e-3 of the largest, and every score is the same.

    clock: seconds, from any start.
    """
    graphs = [packing.onnx_bytes(data) for data in files]
    images = _some(graphs, batches, load, seconds, clock)
    count = sum(len(x) for x, _ in images)
    first = obvious()
    everything = {
        EvaluationPlan(workers, threads, batch)
        for workers, threads in {(1, cores()), (cores(), 1)}
        for batch in BATCHES
        if batch * workers <= count
    }
    reference, base = _timed(first, graphs, images, load, clock)
    expected = [scores(task, outputs, targets) for outputs, targets in reference]
    best, least = first, base
    for plan in sorted(everything, key=lambda w: (w.workers, w.threads, w.batch)):
        found, took = _timed(plan, graphs, images, load, clock)
        if took < 0.95 * least and _same(reference, found, expected, task):
            best, least = plan, took
    return best, base / least


def _some(
    graphs: Sequence[bytes],
    batches: Iterable[tuple[Tensor, Tensor]],
    load: Callable[[bytes, int], Network],
    seconds: float,
    clock: Callable[[], float],
) -> list[tuple[Tensor, Tensor]]:
    """The first images: as many as the obvious way takes the given time for, and one batch at least."""
    networks = [load(graph, obvious().threads) for graph in graphs]
    images: list[tuple[Tensor, Tensor]] = []
    spent = 0.0
    for x, y in batches:
        begin = clock()
        for network in networks:
            list(predictions(network, [(x, y)]))
        spent += clock() - begin
        images.append((x, y))
        if spent > seconds:
            break
    return images


def _timed(
    plan: EvaluationPlan,
    graphs: Sequence[bytes],
    images: Sequence[tuple[Tensor, Tensor]],
    load: Callable[[bytes, int], Network],
    clock: Callable[[], float],
) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """What each file gives for all images, and the seconds of the faster of two goes."""
    networks = [load(graph, plan.threads) for graph in graphs]
    parts = list(rebatched(images, plan.batch))
    took = []
    for _ in range(2):
        begin = clock()
        found = [list(predictions(network, parts, plan.workers)) for network in networks]
        took.append(clock() - begin)
    joined = [(torch.cat([out for out, _ in pairs]), torch.cat([y for _, y in pairs])) for pairs in found]
    return joined, min(took)


def _same(
    reference: Sequence[tuple[Tensor, Tensor]],
    found: Sequence[tuple[Tensor, Tensor]],
    expected: Sequence[NDArray[np.float64]],
    task: Task,
) -> bool:
    for (outputs, targets), (others, _), known in zip(reference, found, expected, strict=True):
        if float((outputs - others).abs().max()) > 1e-3 * float(outputs.abs().max()):
            return False
        if not np.array_equal(scores(task, others, targets), known):
            return False
    return True
