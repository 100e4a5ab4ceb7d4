"""Files evaluated as fast as this machine can, with the same predictions.

The default plan runs one network with a thread per core, which is rarely the fastest: small networks gain more from
several batches in flight, each on a core of its own, and every network has a batch size that fits the caches. `fastest`
tries plans on real files and images at the start of a study. It drops a plan whose outputs differ from the default
plan's by more than rounding, or in a single score.

Tried and left out: bfloat16 in torch is up to 1.4 times as fast on float networks but changes one prediction in some
hundred; `torch.compile` takes longer to compile a candidate than to evaluate it. Neither of them runs the file that
ships.
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

# Called with the scores of the samples so far; an exception that it raises ends the evaluation.
Watch = Callable[[NDArray[np.float64]], None]
BATCHES = (16, 32, 64, 128, 256)
_TRIAL = 0.15  # seconds that the default plan may take for the images on which plans are compared


@dataclass(frozen=True)
class EvaluationPlan:
    """How files are evaluated.

    Args:
        workers: Batches in flight.
        threads: Threads of each batch.
        batch: Images per batch; 0 for the task's own batches.
    """

    workers: int = 1
    threads: int = 1
    batch: int = 0

    def describe(self) -> str:
        """The plan as people read it: `2 x 64 images at a time, 1 thread each`, `a batch at a time, 2 threads`."""
        images = f"{self.batch} images" if self.batch else "a batch"
        each = f"{self.threads} thread{'s' * (self.threads > 1)}{' each' * (self.workers > 1)}"
        return f"{f'{self.workers} x ' if self.workers > 1 else ''}{images} at a time, {each}"


def obvious() -> EvaluationPlan:
    """The default plan: a thread per core, the task's own batches."""
    return EvaluationPlan(1, cores())


def cores() -> int:
    """The cores that this process may use."""
    return max(1, min(len(os.sched_getaffinity(0)), torch.get_num_threads()))


def predictions(
    network: Network, batches: Iterable[tuple[Tensor, Tensor]], workers: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """The `(outputs, targets)` of a network, batch by batch and in order.

    Args:
        network: The network.
        batches: Batches `(inputs, targets)`.
        workers: Batches in flight.

    Raises:
        ExportFailed: The network does not run.
    """

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(network(x.contiguous().numpy()))

    if workers == 1:
        for x, y in batches:
            yield run(x), y
        return
    stream = iter(batches)
    with ThreadPoolExecutor(workers) as pool:
        # Only a few batches ahead, because all images may not fit into memory.
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
    """The task's metric of an exported network on every sample.

    Args:
        network: The network.
        task: The task whose metric is computed.
        batches: Batches `(inputs, targets)`.
        plan: How to evaluate; one batch at a time on one thread when None.
        watch: Called with the scores so far after 256, 512, 1024, ... samples; it may raise to end the evaluation.

    Raises:
        ExportFailed: The network does not run.
        Diverged: As `scores`.
        TaskError: As `scores`, and when there are no samples.
    """
    plan = plan or EvaluationPlan()
    per_batch: list[NDArray[np.float64]] = []
    seen, look = 0, FIRST
    for outputs, targets in predictions(network, rebatched(batches, plan.batch), plan.workers):
        per_batch.append(scores(task, outputs, targets))
        seen += len(outputs)
        if watch and seen >= look:
            watch(np.concatenate(per_batch))
            while look <= seen:
                look *= 2
    if not per_batch:
        raise TaskError(f"task {task.name!r}: there are no samples to score")
    return np.concatenate(per_batch)


def rebatched(batches: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same samples in the same order, in batches of `size`; with 0 the batches stay as they are.

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
    """Find the fastest plan for packed files like these.

    A plan is taken only if it is faster by a twentieth, its outputs agree with the default plan's to 1e-3 of the
    largest, and every score is the same.

    Args:
        files: Packed files.
        task: The task whose metric is computed.
        batches: Batches `(inputs, targets)`.
        load: `Target.load` of the target that runs the files.
        seconds: How long the default plan may take for all files together, which decides how many of the images are
            used. All plans together take some twenty times as long.
        clock: Gives seconds from any start.

    Returns:
        The plan, and how many times as fast as the default plan it is.
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
        results, took = _timed(plan, graphs, images, load, clock)
        if took < 0.95 * least and _same(reference, results, expected, task):
            best, least = plan, took
    return best, base / least


def _some(
    graphs: Sequence[bytes],
    batches: Iterable[tuple[Tensor, Tensor]],
    load: Callable[[bytes, int], Network],
    seconds: float,
    clock: Callable[[], float],
) -> list[tuple[Tensor, Tensor]]:
    """The first images: as many as the default plan can run in the given time, but at least one batch."""
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
    """The `(outputs, targets)` of each file for all images, and the seconds of the faster of two runs."""
    networks = [load(graph, plan.threads) for graph in graphs]
    parts = list(rebatched(images, plan.batch))
    took = []
    for _ in range(2):
        begin = clock()
        results = [list(predictions(network, parts, plan.workers)) for network in networks]
        took.append(clock() - begin)
    joined = [(torch.cat([out for out, _ in pairs]), torch.cat([y for _, y in pairs])) for pairs in results]
    return joined, min(took)


def _same(
    reference: Sequence[tuple[Tensor, Tensor]],
    results: Sequence[tuple[Tensor, Tensor]],
    expected: Sequence[NDArray[np.float64]],
    task: Task,
) -> bool:
    """Whether the outputs agree to 1e-3 of the largest, and every score is as expected."""
    for (outputs, targets), (others, _), known in zip(reference, results, expected, strict=True):
        if float((outputs - others).abs().max()) > 1e-3 * float(outputs.abs().max()):
            return False
        if not np.array_equal(scores(task, others, targets), known):
            return False
    return True
