"""The machine and the versions that measured numbers depend on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import onnx
import onnxruntime
import torch

from .targets.target import Target


def environment(target: Target | None = None) -> dict[str, str]:
    """What measured numbers depend on beside the recipe: processor, cores and versions.

    Args:
        target: The target that was measured; its own entries are added.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        **(target.environment if target else {}),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
