"""How much sooner than a good hand-written loop: wall time until 0.98 of the hypervolume that both find in the end.

    python benchmarks/throughput.py [--seeds 3] [--first 0] [--trials 60] [--hand-trials 200] [--images 5000]

The search: weight bits of every layer of ResNet-20 on CIFAR-10 (3, 4, 5, 6, 8; the first and the last layer 4, 6, 8),
error against bytes, within 25% of the bytes and 5 points of accuracy, BatchNorm re-estimated, no training. The
hypervolume is counted from these limits.

- `hand`: what one would write with Optuna and torch: multivariate TPE with constraints, the weights replaced in a copy
  of the network (by this package's own quantizer, so that it is not about that), BatchNorm re-estimated by torch, the
  validation images evaluated by torch in the layout and with the batch size that are the fastest here, bytes by
  arithmetic. Nothing is exported, timed or logged.
- `paretorch`: `Study(...)` as it is, from the call to the last trial: tracing, preflight, export, packing, timing,
  journal and MLflow included.

Both run side by side in one process, seed by seed. The second table says how much of paretorch's time is spent inside
forward passes (of torch, or of ONNX Runtime, timing included). It needs the CIFAR-10 images
(benchmarks/cifar10/task.py).
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import optuna
import torch
from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).resolve().parent / "cifar10"))
from task import task as cifar10

from paretorch import Rule, Space, Study, Task
from paretorch.objectives import cost
from paretorch.objectives.pareto import hypervolume
from paretorch.runners.compression.library import compress_layer
from paretorch.runners.operators.fold import reestimate_batchnorms
from paretorch.runners.operators.quantize import codes
from paretorch.runners.task import inputs
from paretorch.search.listener import Quiet
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover

SPACE = Space(weight_bits=(Rule((3, 4, 5, 6, 8)), Rule((4, 6, 8), ("first", "last"))), recovery=(Recover("batchnorm"),))
BUDGET = ("size_bytes <= 25%", "accuracy >= -5%")


@dataclass
class Trace:
    """The points of a search, each with the seconds since its start."""

    seconds: list[float] = field(default_factory=list)
    points: list[tuple[float, float]] = field(default_factory=list)  # error, share of the bytes
    took: float = 0.0

    def volumes(self, reference: tuple[float, float]) -> np.ndarray:
        return np.array([hypervolume(self.points[: n + 1], reference) for n in range(len(self.points))])


def by_hand(task: Task, structure: Any, overhead: Any, base: tuple[float, float], seed: int, trials: int) -> Trace:
    """The loop of a good engineer; `base` is the accuracy and the bytes of the untouched network."""
    trace, started = Trace(), time.perf_counter()
    network = task.model().eval().to(memory_format=torch.channels_last)
    calibration = [p.contiguous(memory_format=torch.channels_last) for p in inputs(task, "train", 512, seed).split(64)]
    samples = [task.validation[i] for i in range(len(task.validation))]  # type: ignore[arg-type,index]
    x = torch.stack([x for x, _ in samples]).contiguous(memory_format=torch.channels_last)
    y = torch.tensor([y for _, y in samples])
    names = [layer.name for layer in structure.layers]
    choices = {name: (4, 6, 8) if name in (names[0], names[-1]) else (3, 4, 5, 6, 8) for name in names}

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        bits = {name: choices[name][trial.suggest_int(name, 0, len(choices[name]) - 1)] for name in names}
        model = copy.deepcopy(network)
        with torch.inference_mode():
            for name, width in bits.items():
                weight = model.get_submodule(name).weight
                scale = compress_layer(weight, width, 0.0).scale
                weight.copy_(codes(weight, scale, width) * scale.view(-1, *[1] * (weight.ndim - 1)))
        reestimate_batchnorms(model, calibration)
        with torch.inference_mode():
            hits = sum(
                int((model(part).argmax(1) == want).sum()) for part, want in zip(x.split(64), y.split(64), strict=True)
            )
        size = cost.size_bytes(structure, Recipe(tuple(Quantize(n, b) for n, b in bits.items())), overhead) / base[1]
        accuracy = hits / len(y)
        trial.set_constraint("size", size - 0.25)
        trial.set_constraint("accuracy", base[0] - 0.05 - accuracy)
        trace.points.append((1 - accuracy, size))
        trace.seconds.append(time.perf_counter() - started)
        return 1 - accuracy, size

    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
    optuna.create_study(directions=["minimize"] * 2, sampler=sampler).optimize(objective, n_trials=trials)
    trace.took = time.perf_counter() - started
    return trace


class Follow(Quiet):
    """Notes every trial."""

    def __init__(self) -> None:
        self.trace, self.started, self.begun = Trace(), time.perf_counter(), 0.0

    def finished(self, candidate: Any, front: Any, done: int, total: int, eta: float) -> None:
        self.begun = self.begun or time.perf_counter()
        if candidate.measurement is not None:
            base = front.baseline.value("size_bytes")
            values = candidate.measurement
            self.trace.points.append((1 - values.value("accuracy"), values.value("size_bytes") / base))
            self.trace.seconds.append(time.perf_counter() - self.started)
        self.trace.took = time.perf_counter() - self.started


class Inside:
    """The intervals in which some forward pass runs, of torch or of ONNX Runtime, in any thread."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []
        self.depth = threading.local()

    def __enter__(self) -> Inside:
        self.before = torch.nn.Module.__call__, ort.InferenceSession.run
        module_call, session_run = self.before

        def wrapped(real: Any) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                outer = getattr(self.depth, "value", 0)
                self.depth.value = outer + 1
                begin = time.perf_counter()
                try:
                    return real(*arguments, **named)
                finally:
                    self.depth.value = outer
                    if not outer:
                        self.spans.append((begin, time.perf_counter()))

            return call

        torch.nn.Module.__call__ = wrapped(module_call)  # type: ignore[method-assign]
        ort.InferenceSession.run = wrapped(session_run)
        return self

    def __exit__(self, *_: object) -> None:
        torch.nn.Module.__call__, ort.InferenceSession.run = self.before  # type: ignore[method-assign]

    def seconds(self, since: float, until: float) -> float:
        """How much of the time between two moments lies in at least one span."""
        total, reached = 0.0, since
        for begin, end in sorted(self.spans):
            begin, end = max(begin, reached), min(end, until)
            if end > begin:
                total, reached = total + end - begin, end
        return total


def ours(task: Task, seed: int, trials: int) -> tuple[Trace, Any, float]:
    """A study; its trace, itself, and the share of its trials' time that was spent inside forward passes."""
    follow = Follow()
    with tempfile.TemporaryDirectory() as folder, Inside() as inside:
        study = Study(task, SPACE, budget=BUDGET, directory=Path(folder) / "s", seed=seed, listener=follow)
        study.run(trials=trials)
    until = follow.started + follow.trace.took
    return follow.trace, study, inside.seconds(follow.begun, until) / (until - follow.begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--hand-trials", type=int, default=200)
    parser.add_argument("--images", type=int, default=5000)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    whole = cifar10()
    some = Subset(whole.validation, range(arguments.images))  # type: ignore[arg-type]  # it is a dataset
    task = replace(whole, validation=some, test=None)
    print("seed  search      trials  total s  s/trial  hypervolume  s until 0.98   ratio   inside forward passes")
    ratios = []
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        mine, study, share = ours(task, seed, arguments.trials)
        base = study.judge.baseline.value("accuracy"), study.judge.baseline.value("size_bytes")
        hand = by_hand(task, study.facts.structure, study.judge.overheads[""], base, seed, arguments.hand_trials)
        reference = (1 - base[0] + 0.05, 0.25)
        final = hypervolume([*mine.points, *hand.points], reference)
        reached = {}
        for name, trace in (("paretorch", mine), ("hand", hand)):
            volumes = trace.volumes(reference) / final
            enough = np.flatnonzero(volumes >= 0.98)
            reached[name] = trace.seconds[enough[0]] if len(enough) else float("inf")
            until = f"{reached[name]:.0f}" if len(enough) else f"> {trace.took:.0f}"
            ratio = hand.took if name == "hand" and not len(enough) else reached[name]
            both = name == "hand" and np.isfinite(reached["paretorch"])
            times = f"{ratio / reached['paretorch']:.1f}" if both else ""
            print(
                f"{seed:<6}{name:<12}{len(trace.points):<8}{trace.took:<9.0f}{trace.took / len(trace.points):<9.2f}"
                f"{volumes[-1]:<13.4f}"
                f"{until:<15}{('> ' if times and not len(enough) else '') + times:<8}"
                f"{f'{100 * share:.0f}%' if name == 'paretorch' else ''}",
                flush=True,
            )
        ratios.append(min(reached["hand"], hand.took) / reached["paretorch"])
    print(f"ratio of the times until 0.98, at least: median {np.median(ratios):.1f}, least {min(ratios):.1f}")


if __name__ == "__main__":
    main()
