"""ONNX Runtime on the CPU: the default, and the fastest for small networks, because a call costs it the least."""

from __future__ import annotations

from typing import Any

import onnxruntime
from numpy.typing import NDArray

from ...errors import ExportFailed
from .runtime import session
from .target import Network, Target


def make(name: str) -> Target:
    """The target; the environment records the version."""
    return Target(name, load, calling_thread=True, environment={"onnxruntime": onnxruntime.__version__})


def load(model: bytes, threads: int) -> Network:
    """A function that computes an ONNX file with so many threads; raises `ExportFailed` where it cannot."""
    runtime = session(model, threads)
    entry = runtime.get_inputs()[0].name

    def run(batch: NDArray[Any]) -> NDArray[Any]:
        try:
            outputs: list[NDArray[Any]] = runtime.run(None, {entry: batch})
        except Exception as error:  # ONNX Runtime raises a class per status, without a common base but this
            raise ExportFailed(f"the exported network does not run in ONNX Runtime: {error}") from error
        return outputs[0]

    return run
