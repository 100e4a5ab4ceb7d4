"""ONNX Runtime on the CPU: the default, and the fastest for small networks, because a call costs it the least."""

from __future__ import annotations

from typing import Any

import onnxruntime
from numpy.typing import NDArray

from ...errors import ExportFailed
from .runtime import session
from .target import Network, Target


def make(name: str) -> Target:
    """The target; its environment holds the version."""
    return Target(name, load, calling_thread=True, environment={"onnxruntime": onnxruntime.__version__})


def load(model: bytes, threads: int) -> Network:
    """Load an ONNX file.

    Args:
        model: The bytes of the file.
        threads: CPU threads of each run.

    Returns:
        A function from a batch of inputs to the first output; it raises `ExportFailed` when the network does not run.

    Raises:
        ExportFailed: ONNX Runtime cannot load the file.
    """
    runtime = session(model, threads)
    entry = runtime.get_inputs()[0].name

    def run(batch: NDArray[Any]) -> NDArray[Any]:
        try:
            outputs: list[NDArray[Any]] = runtime.run(None, {entry: batch})
        except Exception as error:  # ONNX Runtime raises a class per status, without a common base but this
            raise ExportFailed(f"the exported network does not run in ONNX Runtime: {error}") from error
        return outputs[0]

    return run
