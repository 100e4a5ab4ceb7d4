"""Whether one ONNX file is faster than another: the protocol of `paretorch measure`.

1. The files run in a fresh process that imports only ONNX Runtime and NumPy, with a fixed number of threads pinned to
   as many cores (where the system allows it). Both files are loaded there as a study loads them, and get the same
   random inputs (`feed`).
2. Time is taken in blocks of at least 2 ms: one run that is not counted, because the other file has just filled the
   caches with its own weights, and then several runs in a row. With one thread the clock is the thread's CPU time,
   which excludes preemption by other programs; with more it is the wall clock.
3. Warm-up: both files in turns, at least ten blocks each, until the last five blocks are not clearly faster than the
   five before; for a tenth of the time limit at most.
4. Pairs: a block of each file, in an order that is drawn anew for every pair. So a temporary slowdown of the machine
   affects both files, and the cost of running second affects each of them as often.
5. The estimate is the median of the ratios within pairs, candidate / baseline. Its 95% interval is that of a median by
   order statistics, which assumes no distribution of the times. Outliers change neither of them by much.
6. The measurement ends when half the interval is within the requested precision, or at the time limit, but not before
   six pairs, the fewest for which such an interval exists. The precision is checked only after 20, 40, 80, ... pairs.
   If it were checked after every pair, the measurement would tend to stop at intervals that are narrow by chance: they
   hold the true ratio in 91 to 94% of simulated cases, those of growing numbers of pairs in 94 to 98%.
7. The verdict: *faster* when the whole interval is below 1, *slower* when it is above 1, else *no significant
  difference*.

With a single file, steps 2 to 6 are the same for its milliseconds.

Limits: the interval covers the times of one process in these seconds. The placement of its memory and the state of its
core stay the same throughout, but differ in the next process: on a shared virtual machine the ratio of int8 to float
spreads by 4 to 5% between processes, whatever the interval of each (`benchmarks/latency.py`).
"""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ...errors import ArtifactError, ConfigError, ExportFailed, ParetorchError, TargetError
from ...objectives.measurement import Estimate
from ..targets.latency import block, median
from ..targets.runtime import session
from .random_inputs import Shapes, feed

FIRST_LOOK, FEWEST = 20, 6  # pairs
_BLOCK = 2e6  # nanoseconds that one timing lasts at least
Timer = Callable[[], float]  # runs a block and gives the milliseconds of one run


@dataclass(frozen=True)
class LatencyComparison:
    """The latency of one file, or of two files and their ratio.

    Args:
        ms: For each file, the milliseconds of a run.
        ratio: The latency of the first file as a share of the second's; None for one file.
        verdict: What the interval of the ratio says, in words; None for one file.
        pairs: Timed blocks per file.
        reached: Whether the interval (of the ratio, or of the one file's time) is as narrow as requested.
        seconds: How long the measurement took.
        inputs: For each file, type and shape of its inputs by name.
        environment: What the numbers depend on beside the files.
    """

    ms: tuple[Estimate, ...]
    ratio: Estimate | None
    verdict: str | None
    pairs: int
    reached: bool
    seconds: float
    inputs: tuple[dict[str, str], ...]
    environment: dict[str, str]


def compare(
    files: Sequence[Path],
    *,
    threads: int = 1,
    batch: int | None = None,
    precision: float = 0.02,
    seconds: float = 20.0,
    shapes: Shapes | None = None,
    seed: int = 0,
) -> LatencyComparison:
    """Measure a file, or the first of two against the second, by the protocol of this module.

    Args:
        files: One or two ONNX files, or directories of artifacts.
        threads: CPU threads of the runtime.
        batch: Inputs per run; when None, 1 or what a file fixes.
        precision: Half the interval as a share of the estimate at which the measurement ends.
        seconds: The time limit.
        shapes: By input, the shapes of inputs with other open dimensions.
        seed: The seed of the inputs and of the order within pairs.

    Raises:
        ConfigError: An option does not fit.
        ArtifactError: A file is missing or does not run.
        TargetError: The process died.
    """
    paths = [onnx_file(path) for path in files]
    cores = len(os.sched_getaffinity(0))
    problems = [f"threads = {threads}: this process may use {cores} cores; choose from 1 to {cores}"] * (
        not 1 <= threads <= cores
    )
    if batch is not None and batch < 1:
        problems.append(f"batch = {batch}: a run needs at least one input")
    if not 0 < precision < 1:
        problems.append(f"precision = {precision:g}: choose a share of the time above 0 and below 1, such as 0.02 (2%)")
    if not 0 < seconds < math.inf:
        problems.append(f"time = {seconds:g} s: choose a finite time above 0, such as 20s")
    if problems:
        raise ConfigError(problems, "measure")
    request = {
        "files": [str(path) for path in paths],
        "threads": threads,
        "batch": batch,
        "precision": precision,
        "seconds": seconds,
        "shapes": {k: list(v) for k, v in (shapes or {}).items()},
        "seed": seed,
    }
    # The child imports from the same places as this process; -P keeps it from searching the current folder first.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        tail = " ".join(done.stderr.split())[-500:] or "it said nothing"
        raise TargetError(
            f"the process that measures {' and '.join(map(str, files))} ended with code {done.returncode} "
            f"(negative: killed by that signal): {tail}"
        ) from None
    if "error" in answer:
        kind, told = answer["error"]
        raise ConfigError(told, "measure") if kind == "ConfigError" else ArtifactError(told)
    return LatencyComparison(
        **answer
        | {
            "ms": tuple(Estimate(**entry) for entry in answer["ms"]),
            "ratio": answer["ratio"] and Estimate(**answer["ratio"]),
            "inputs": tuple(answer["inputs"]),
        }
    )


def onnx_file(path: Path) -> Path:
    """The ONNX file that a path stands for: the file itself, or `model.onnx` in the directory of an artifact.

    Raises:
        ArtifactError: There is no such file.
    """
    file = path / "model.onnx" if path.is_dir() else path
    if not file.is_file():
        said = f"{path} holds no model.onnx" if path.is_dir() else f"there is no file {path}"
        raise ArtifactError(
            f"{said}; name an .onnx file, or a directory that `paretorch export STUDY --to DIR` has written"
        )
    return file.absolute()


def parse_precision(text: str) -> float:
    """Parse a share above 0 and below 1.

    Raises:
        ConfigError: The text is not such a share.

    >>> parse_precision("2%"), parse_precision("0.005")
    (0.02, 0.005)
    """
    number = text.strip()
    try:
        value = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise ConfigError(f"{text!r}: write a share of the time above 0% and below 100%, such as 2% or 0.02")
    return value


def verdict(ratio: Estimate) -> str:
    """What the interval of candidate / baseline says, in words."""
    return "faster" if ratio.high < 1 else "slower" if ratio.low > 1 else "no significant difference"


def warm_up(timers: Sequence[Timer], seconds: float, now: Callable[[], float] = time.perf_counter) -> None:
    """Run all timers in turns until their times settle.

    Args:
        timers: The timers; each runs at least ten blocks.
        seconds: The limit after which the warm-up ends with fewer.
        now: Gives seconds from any start.
    """
    end = now() + seconds
    times: list[list[float]] = []
    while len(times) < 10 or (now() < end and not _settled(np.array(times))):
        times.append([timer() for timer in timers])
        if now() > end and len(times) >= 2:  # a network this slow is warm after two
            return


def _settled(times: NDArray[np.float64]) -> bool:
    """Whether none of the files was clearly faster in its last five blocks than in the five before."""
    return bool((np.median(times[-5:], axis=0) > 0.95 * np.median(times[-10:-5], axis=0)).all())


def sample(
    timers: Sequence[Timer],
    precision: float,
    seconds: float,
    seed: int = 0,
    now: Callable[[], float] = time.perf_counter,
) -> NDArray[np.float64]:
    """Time pairs of blocks until the precision is reached or the time is over.

    Args:
        timers: A timer per file.
        precision: Half the interval as a share of the estimate at which the measurement ends.
        seconds: The time limit; at least `FEWEST` pairs are timed.
        seed: The seed of the order within pairs.
        now: Gives seconds from any start.

    Returns:
        Milliseconds, a row per pair and a column per file.
    """
    rng = np.random.default_rng(seed)
    rows: list[list[float]] = []
    end, look = now() + seconds, FIRST_LOOK
    while True:
        row = [0.0] * len(timers)
        for which in rng.permutation(len(timers)):
            row[which] = timers[which]()
        rows.append(row)
        if len(rows) == look:
            if precise(estimate(np.array(rows)), precision):
                break
            look *= 2
        if len(rows) >= FEWEST and now() >= end:
            break
    return np.array(rows)


def estimate(times: NDArray[np.float64]) -> Estimate:
    """The median of the ratios of the first column to the second; with one column, the median of its times."""
    return median(times[:, 0] / times[:, 1] if times.shape[1] > 1 else times[:, 0])


def precise(measured: Estimate, precision: float) -> bool:
    """Whether half the interval is within `precision` of the value."""
    return (measured.high - measured.low) / 2 <= precision * measured.value


# --- in the fresh process ---------------------------------------------------------------------------------------------


def _measure(request: dict[str, Any]) -> LatencyComparison:
    threads: int = request["threads"]
    cores = pin(threads)
    files = request["files"]
    runtimes = []
    for file in files:
        try:
            runtimes.append(session(Path(file), threads))
        except ExportFailed as error:
            raise ArtifactError(f"{file} is no ONNX model that ONNX Runtime can load: {error.__cause__}") from error
    names = dict.fromkeys(entry.name for runtime in runtimes for entry in runtime.get_inputs())
    unknown = [name for name in request["shapes"] if name not in names]
    if unknown:
        raise ConfigError([f"--shape {name!r}: there is no such input; inputs: {', '.join(names)}" for name in unknown])
    feeds = []
    for file, runtime in zip(files, runtimes, strict=True):
        try:
            feeds.append(feed(runtime.get_inputs(), request["batch"], request["shapes"], request["seed"]))
        except ConfigError as error:
            raise ConfigError([f"{file}: {problem}" for problem in error.problems]) from error
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    gc.disable()
    timers = [
        timer_of(file, partial(runtime.run, None, arrays), _told(arrays), clock)
        for file, runtime, arrays in zip(files, runtimes, feeds, strict=True)
    ]
    warm_up(timers, request["seconds"] / 10)
    started = time.perf_counter()
    times = sample(timers, request["precision"], request["seconds"], request["seed"])
    measured = estimate(times)
    ratio = measured if len(files) > 1 else None
    about = {
        "threads": str(threads),
        "cores": ", ".join(map(str, cores)) or "not pinned",
        "clock": "CPU time of the thread" if threads == 1 else "wall clock",
        "onnxruntime": ort.__version__,
    }
    return LatencyComparison(
        ms=tuple(median(column) for column in times.T),
        ratio=ratio,
        verdict=verdict(ratio) if ratio else None,
        pairs=len(times),
        reached=precise(measured, request["precision"]),
        seconds=time.perf_counter() - started,
        inputs=tuple({name: f"{x.dtype}{list(x.shape)}" for name, x in arrays.items()} for arrays in feeds),
        environment=about,
    )


def pin(threads: int) -> list[int]:
    """Bind this process, and so the threads that it starts later, to as many cores as threads.

    Returns:
        The numbers of the cores; empty where the system does not allow it.
    """
    cores = sorted(os.sched_getaffinity(0))[-threads:]
    try:
        os.sched_setaffinity(0, cores)
    except OSError:
        return []
    return cores


def _told(arrays: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {list(x.shape)}" for name, x in arrays.items())


def timer_of(file: str, run: Callable[[], object], inputs: str, clock: Callable[[], int]) -> Timer:
    """A timer of a file's network, which runs it several times in a row.

    Args:
        file: The name of the file, for messages.
        run: Runs the network once.
        inputs: A description of the inputs, for messages.
        clock: Gives nanoseconds.

    Raises:
        ArtifactError: The network does not run.
    """

    def once() -> int:
        begin = clock()
        run()
        return clock() - begin

    try:
        once()
    except Exception as error:  # ONNX Runtime raises a class per status, without a common base but this
        raise ArtifactError(f"{file} does not run on {inputs}: {error}; check --batch and --shape") from error
    runs = max(1, math.ceil(_BLOCK / max(min(once(), once()), 1)))

    return lambda: block(run, runs, clock) / runs / 1e6


def _main() -> None:
    """Read a request from standard input and print the answer, each as a line of JSON."""
    try:
        answer = asdict(_measure(json.load(sys.stdin)))
    except ParetorchError as error:
        told = error.problems if isinstance(error, ConfigError) else str(error)
        answer = {"error": [type(error).__name__, told]}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
