"""ResNet-20 on CIFAR-10 beside its untouched self: what several benchmarks measure. Images: see
`benchmarks/cifar10/task.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent / "cifar10"))
from task import task as cifar10

from paretorch.runners.local import LocalRunner
from paretorch.spaces.recipe import Recipe


def untouched(folder: Path) -> tuple[LocalRunner, bytes, NDArray[Any]]:
    """A runner, the packed file of the network as it is, and whether it gets each of the 10,000 test images right."""
    runner = LocalRunner(cifar10(), folder)
    packed = runner.build(Recipe())
    runner.tune_evaluation([packed])
    base = runner.scores(packed, "test")
    print(f"untouched: {100 * base.mean():.2f}%, {len(packed)} bytes", flush=True)
    return runner, packed, base


def points(runner: LocalRunner, packed: bytes, base: NDArray[Any]) -> str:
    """What a packed file gains on the same images, with half the 95% interval."""
    gained = 100 * (runner.scores(packed, "test") - base)
    return f"{gained.mean():.2f} ±{1.96 * gained.std(ddof=1) / len(gained) ** 0.5:.2f}"
