"""What the engine itself costs per trial: everything but compressing, training, evaluating and measuring.

    python benchmarks/overhead.py [TRIALS ...]        # default: 50 200 500; about two minutes

A network with 30 layers gives a space of more than 60 decisions. Its candidates are not carried out: their numbers are
made up from their bits, so what is left is asking the sampler, arithmetic, the journal (one fsync), the front, the
hypervolume, the files and MLflow in its SQLite store. Each row is the time per trial over the 50 trials before it, by
the clock and of the processor (`cpu`, which other programs on the machine do not reach), and the part that the
sampler's suggestion and MLflow have in the latter. `asked` is how many suggestions a trial took: one that is known
already is asked for again, and these made-up numbers, without any noise to speak of, make TPE repeat itself often.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from paretorch import Study, Task
from paretorch.objectives import cost
from paretorch.objectives.measurement import Estimate
from paretorch.results.candidate import Candidate
from paretorch.results.front import Front
from paretorch.runners.compression.trace import trace
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.targets.target import Target
from paretorch.runners.testing import FunctionRunner
from paretorch.search.listener import Quiet
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.rules import Rule
from paretorch.spaces.space import Space
from paretorch.spaces.structure import Structure
from paretorch.spaces.techniques.quantize import Quantize

WINDOW = 50
LAYERS = 30


OVERHEAD = cost.FileOverhead(4000, 120, 300)


def made_up(structure: Structure, recipe: Recipe) -> dict[str, Estimate]:
    """Every layer costs accuracy by its bits and its place, with a trace of noise: a front of many points."""
    size = cost.size_bytes(structure, recipe, OVERHEAD)
    bits = {step.layer: step.weight_bits for step in recipe.of(Quantize)}
    loss = sum(2.0 ** -bits.get(layer.name, 32) / (1 + i) for i, layer in enumerate(structure.layers))
    accuracy = max(0.0, 0.95 - loss - 1e-4 * int(recipe.key[:2], 16) / 255)
    return {
        "size_bytes": Estimate.exact(size),
        "onnx_bytes": Estimate.exact(size),
        "latency_ms": Estimate(size / 1e5, size / 1.1e5, size / 0.9e5, 100),
        "accuracy": Estimate.rate(round(10_000 * accuracy), 10_000),
    }


def make_runner(task: Task, directory: Path, settings: MeasurementSettings, *, target: Target | None) -> FunctionRunner:
    """Tells made-up numbers at once."""
    structure = trace(network(), torch.randn(8, 16))
    return FunctionRunner(structure, lambda recipe: made_up(structure, recipe), directory, overhead=OVERHEAD)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(LAYERS - 1):
        layers += [nn.Linear(16, 16), nn.ReLU() if i % 2 else nn.Identity()]
    return nn.Sequential(*layers, nn.Linear(16, 4)).eval()


def task() -> Task:
    x, y = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 4
    data = TensorDataset(x, y)
    return Task("overhead", network, train=data, validation=data)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


def main() -> None:
    marks = [int(text) for text in sys.argv[1:]] or [50, 200, 500]
    space = Space(
        weight_bits=(Rule((3, 4, 6, 8)),),
        sparsity=(Rule((0.0, 0.3, 0.5)),),
        activation_bits=(Rule((8, 32), share=True),),
    )
    print("objectives  trials  decisions  median ms  95% ms  cpu median  cpu 95%  asking  MLflow  asked")
    for objectives in (["accuracy", "size_bytes"], ["accuracy", "size_bytes", "latency_ms"]):
        with tempfile.TemporaryDirectory() as folder:
            clock = Clock()
            study = Study(
                task(),
                space,
                objectives=objectives,
                budget=["size_bytes <= 60%"],
                directory=Path(folder) / "study",
                listener=clock,
                make_runner=make_runner,
            )
            asking, logging = _timed(study)
            for mark in marks:
                for values in (study.overhead_seconds, clock.seconds, asking, logging):
                    values.clear()
                study.run(mark)
                wall, cpu = study.overhead_seconds[-WINDOW:], clock.seconds[-WINDOW:]
                # A repeated suggestion is asked for again, so there are more questions than trials.
                shares = [1000 * sum(values) / len(clock.seconds) for values in (asking, logging)]
                numbers = (
                    statistics.median(wall),
                    percentile(wall, 0.95),
                    statistics.median(cpu),
                    percentile(cpu, 0.95),
                )
                median, high, cpu_median, cpu_high = (1000 * value for value in numbers)
                print(
                    f"{len(objectives):10}  {mark:6}  {len(study.distributions):9}  {median:9.1f}  {high:6.1f}  "
                    f"{cpu_median:10.1f}"
                    f"  {cpu_high:7.1f}  {shares[0]:6.1f}  {shares[1]:6.1f}  {len(asking) / len(clock.seconds):5.2f}",
                    flush=True,
                )


class Clock(Quiet):
    """The processor's time from trial to trial; the first of a run also pays for opening the study, and is left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last: float | None = None

    def phase(self, text: str) -> None:
        if not text.startswith("trial"):
            self.last = None

    def finished(self, candidate: Candidate, front: Front, done: int, total: int, eta: float) -> None:
        now = time.process_time()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now


def _timed(study: Study) -> tuple[list[float], list[float]]:
    """Processor seconds that the study spends in asking the sampler, and in MLflow, a number each time."""
    asking: list[float] = []
    logging: list[float] = []

    def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begin = time.process_time()
            try:
                return function(*arguments)
            finally:
                seconds.append(time.process_time() - begin)

        return call

    assemble = study._assemble

    def timed_assemble(*arguments: Any) -> None:
        assemble(*arguments)
        study.mirror.log = timed(study.mirror.log, logging)  # type: ignore[method-assign]  # to be timed

    study._assemble = timed_assemble  # type: ignore[method-assign]  # its parts are there only then
    study._next = timed(study._next, asking)  # type: ignore[method-assign]  # to be timed
    return asking, logging


if __name__ == "__main__":
    main()
