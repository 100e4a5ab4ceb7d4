"""Packed files measured in a clean process, which has only the file on the disk and no state of the search.

The process is a fresh Python that imports NumPy and the target's runtime (ONNX Runtime, and then no torch), and nothing
of the user's. It reads a packed file, unpacks it and runs it on the target. The task stays in the parent process,
because it may be an object of the user's program that no other process can create: the parent reads the samples, sends
the inputs, receives the outputs and scores them. So a task from a configuration and one defined in a notebook are
measured in the same way, and no data set is loaded twice.

Inputs and outputs go through one socket per batch in flight, as raw bytes after a line of JSON; nothing is pickled.
When the other end of a socket is closed, the thread that serves it ends. When the parent dies, the kernel ends the
process (`prctl(2)`, PR_SET_PDEATHSIG), so that nothing is left running.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ArtifactError, ExportFailed, ParetorchError
from ...objectives.measurement import Estimate
from ..files import packing
from ..targets.catalog import DEFAULT, TARGETS, as_target
from ..targets.target import Network, Target
from .compare import estimate, pin, sample, timer_of, warm_up

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluate import EvaluationPlan
    from ..task import Task

_PRECISION = 0.01  # half the interval of a latency's ratio at which timing ends


class CleanProcess:
    """A process that runs packed files, one at a time.

    It starts with the first file and ends with the `with` block. After a file that makes it crash, the next one gets a
    new process.

    Args:
        target: The target that runs the files there, as `Target.spec` gives it.
    """

    def __init__(self, target: str | dict[str, Any] = DEFAULT) -> None:
        self.target = target
        self._process: subprocess.Popen[bytes] | None = None
        self._connections: list[Connection[Any, Any]] = []
        self._errors: Any = None

    def __enter__(self) -> CleanProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def scores(
        self, path: Path, task: Task, batches: Iterable[tuple[Tensor, Tensor]], plan: EvaluationPlan
    ) -> NDArray[np.float64]:
        """The task's metric of a packed file on every sample, in the order of the samples.

        Args:
            path: The packed file.
            task: The task whose metric is computed.
            batches: Batches `(inputs, targets)`.
            plan: How to evaluate.

        Raises:
            ExportFailed: The file does not run.
            Diverged: As `runners.task.scores`.
            TaskError: As `runners.task.scores`.
        """
        from ..evaluate import evaluate

        self._need(plan.workers)
        self._ask({"do": "load", "path": str(path), "threads": plan.threads, "target": self.target})
        free: queue.SimpleQueue[Connection[Any, Any]] = queue.SimpleQueue()
        for connection in self._connections[: plan.workers]:
            free.put(connection)

        def network(inputs: NDArray[Any]) -> NDArray[Any]:
            connection = free.get()
            try:
                return self._run(connection, inputs)
            finally:
                free.put(connection)

        return evaluate(network, task, batches, plan)

    def ratio(self, path: Path, against: Path, batch: NDArray[Any], threads: int, seconds: float) -> Estimate:
        """The latency of a packed file as a share of another one's, by the protocol of `runners.timing.compare`.

        The measurement ends when half the 95% interval is within 1%, or at the time limit.

        Args:
            path: The packed file.
            against: The packed file that it is compared with.
            batch: The inputs of each run.
            threads: CPU threads of the runtime.
            seconds: The time limit.

        Raises:
            ExportFailed: A file does not run.
        """
        self._need(1)
        request = {
            "do": "time",
            "paths": [str(path), str(against)],
            "threads": threads,
            "seconds": seconds,
            "target": self.target,
        }
        return Estimate(**self._ask(request, batch)["ratio"])

    def _need(self, workers: int) -> None:
        """Start a process with a socket per worker, unless one is running."""
        if self._process and self._process.poll() is None and len(self._connections) >= workers:
            return
        self._end()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # stays open as long as the process
        pairs = [Pipe() for _ in range(workers)]
        ends = [theirs.fileno() for _, theirs in pairs]
        # The child imports from the same places as this process; -P keeps it from searching the current folder first.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, *map(str, ends)],
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=os.environ | {"PYTHONPATH": path},
        )
        self._connections = [ours for ours, _ in pairs]
        for _, theirs in pairs:
            theirs.close()

    def _end(self) -> None:
        for connection in self._connections:
            connection.close()
        self._connections = []
        if self._process:
            self._process.kill()
            self._process.wait()
            self._errors.close()
        self._process = None

    def _ask(self, request: dict[str, Any], array: NDArray[Any] | None = None) -> dict[str, Any]:
        """The answer to a request on the first socket."""
        try:
            return _exchange(self._connections[0], request, array)[0]
        except (OSError, EOFError) as error:
            raise ExportFailed(self._death()) from error

    def _run(self, connection: Connection[Any, Any], inputs: NDArray[Any]) -> NDArray[Any]:
        try:
            outputs = _exchange(connection, {"do": "run"}, inputs)[1]
        except (OSError, EOFError) as error:
            raise ExportFailed(self._death()) from error
        assert outputs is not None
        return outputs

    def _death(self) -> str:
        """How the process ended, for people."""
        assert self._process is not None
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            return "the process that ran it does not answer"
        self._errors.seek(0)
        told = " ".join(self._errors.read().decode(errors="replace").split())[-500:]
        how = f"was ended by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
        return f"the process that ran it {how}{f': {told}' if told else ''}"


class ThisProcess:
    """The same as `CleanProcess` but in this process, for a target that only the user's program can create."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def __enter__(self) -> ThisProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def scores(
        self, path: Path, task: Task, batches: Iterable[tuple[Tensor, Tensor]], plan: EvaluationPlan
    ) -> NDArray[np.float64]:
        """As `CleanProcess.scores`."""
        from ..evaluate import evaluate

        return evaluate(self.target.load(_model(path), plan.threads), task, batches, plan)

    def ratio(self, path: Path, against: Path, batch: NDArray[Any], threads: int, seconds: float) -> Estimate:
        """As `CleanProcess.ratio`."""
        return _ratio(self.target, [path, against], batch, threads, seconds)


def process_for(target: Target) -> CleanProcess | ThisProcess:
    """What measures the files of a target: a clean process, if the target can be created in another process."""
    shared = target.profile is not None or target.name in TARGETS
    return CleanProcess(target.spec) if shared else ThisProcess(target)


def _exchange(
    connection: Connection[Any, Any], request: dict[str, Any], array: NDArray[Any] | None
) -> tuple[dict[str, Any], NDArray[Any] | None]:
    """Send a request and receive the answer; raises `ExportFailed` for an answer that is an error."""
    _send(connection, request, array)
    answer, outputs = _receive(connection)
    if "error" in answer:
        raise ExportFailed(answer["error"])
    return answer, outputs


def _send(connection: Connection[Any, Any], message: dict[str, Any], array: NDArray[Any] | None = None) -> None:
    if array is not None:
        array = np.ascontiguousarray(array)
        message = message | {"dtype": array.dtype.str, "shape": array.shape}
    connection.send_bytes(json.dumps(message).encode())
    if array is not None:
        connection.send_bytes(array.reshape(-1).view(np.uint8).data)


def _receive(connection: Connection[Any, Any]) -> tuple[dict[str, Any], NDArray[Any] | None]:
    message = json.loads(connection.recv_bytes())
    if "dtype" not in message:
        return message, None
    array = np.empty(message["shape"], message["dtype"])
    connection.recv_bytes_into(array.reshape(-1).view(np.uint8).data)
    return message, array


# --- in the clean process ---------------------------------------------------------------------------------------------


class _Server:
    """Answers the requests of the parent process, which sends `load` only when nothing is running."""

    def __init__(self) -> None:
        self.network: Network | None = None

    def serve(self, connection: Connection[Any, Any]) -> None:
        """Answer until the other end is closed."""
        while True:
            try:
                request, array = _receive(connection)
            except (EOFError, OSError):
                return
            answer: dict[str, Any] = {}
            outputs = None
            try:
                match request["do"]:
                    case "load":
                        self.network = None  # two networks at once may not fit into memory
                        self.network = as_target(request["target"]).load(_model(request["path"]), request["threads"])
                    case "run":
                        assert self.network is not None
                        assert array is not None
                        outputs = self.network(array)
                    case "time":
                        assert array is not None
                        target, paths = as_target(request["target"]), [Path(path) for path in request["paths"]]
                        ratio = _ratio(target, paths, array, request["threads"], request["seconds"])
                        answer = {"ratio": asdict(ratio)}
            except ParetorchError as error:
                answer = {"error": str(error)}
            except Exception as error:  # ONNX Runtime raises a class per status, without a common base but this
                answer = {"error": f"{type(error).__name__}: {error}"}
            try:
                _send(connection, answer, outputs)
            except OSError:
                return


def _model(path: str | Path) -> bytes:
    """The bytes of the ONNX file of a packed one."""
    try:
        return packing.onnx_bytes(Path(path).read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error


def _ratio(target: Target, paths: Sequence[Path], batch: NDArray[Any], threads: int, seconds: float) -> Estimate:
    """The latency of the first file as a share of the second's."""
    if target.milliseconds is not None:
        own, other = (target.milliseconds(_model(path), len(batch)) for path in paths)
        return Estimate.exact(own / other)
    cores = os.sched_getaffinity(0)
    pin(threads)  # this thread, and those that the sessions start from it
    try:
        networks = [target.load(_model(path), threads) for path in paths]
        clock = time.thread_time_ns if threads == 1 and target.calling_thread else time.perf_counter_ns
        timers = [
            timer_of(str(path), partial(network, batch), str(list(batch.shape)), clock)
            for path, network in zip(paths, networks, strict=True)
        ]
        warm_up(timers, seconds / 10)
        return estimate(sample(timers, _PRECISION, seconds))
    finally:
        os.sched_setaffinity(0, cores)


def _main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    server = _Server()
    first, *others = [Connection(int(number)) for number in sys.argv[1:]]
    for connection in others:
        threading.Thread(target=server.serve, args=(connection,), daemon=True).start()
    server.serve(first)


if __name__ == "__main__":
    _main()
