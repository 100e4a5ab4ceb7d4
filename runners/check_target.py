"""Check that a target keeps the contract that studies rely on; for authors of targets, without pytest.

The target runs what paretorch really exports: a small convolutional network, as it is and after every kind of step that
the target says it supports. The outputs are compared with ONNX Runtime's.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from ..errors import ExportFailed, TargetError
from ..spaces.recipe import Recipe
from ..spaces.steps import Step
from ..spaces.techniques.prune import Prune
from ..spaces.techniques.quantize import Quantize
from ..spaces.techniques.sparsify import Sparsify
from .files import packing
from .local import LocalRunner
from .settings import MeasurementSettings
from .targets.catalog import DEFAULT, as_target
from .targets.target import Network, Target
from .task import Task

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# The share of the largest output by which a file may differ from ONNX Runtime. Sums are added in another order; where
# layers compute in int8, numbers on the border between two steps may round the other way.
_FLOAT, _INT8 = 1e-3, 5e-2
_SECONDS = 0.05  # how long the CPU time of threads is measured


def check_target(target: Target) -> None:
    """Check a target, which takes some seconds.

    Raises:
        TargetError: The target breaks the contract; the message lists every violation.

    >>> check_target(as_target("onnxruntime"))  # doctest: +SKIP
    """
    problems = [*_plain(target)]
    files, x = _files()
    for recipe, model in files.items():
        answers = [_answer(target, step) for step in recipe.steps]
        problems += [str(answer) for answer in answers if isinstance(answer, TargetError)]
        if not any(answers):
            problems += [f"{recipe.describe()}: {problem}" for problem in _runs(target, model, x.copy(), recipe)]
    if target.milliseconds is None:
        problems += _refuses(target)
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in dict.fromkeys(problems))
        raise TargetError(f"the target {target.name!r} breaks {len(dict.fromkeys(problems))} of its promises:{lines}")


@cache
def _files() -> tuple[dict[Recipe, bytes], NDArray[Any]]:
    """The ONNX files of a network of two layers, by recipe, and a few inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)).eval()
        data = TensorDataset(torch.randn(64, 3, 8, 8), torch.zeros(64, dtype=torch.long))
    widths = ((16, 32), (8, 32), (4, 32), (8, 8), (4, 8))
    kinds: list[tuple[Step, ...]] = [(), (Sparsify("3", 0.5),), (Prune("0", 8),)]
    kinds += [tuple(Quantize(layer, *bits) for layer in ("0", "3")) for bits in widths]
    kinds += [tuple(Quantize(layer, *bits, scheme="affine") for layer in ("0", "3")) for bits in ((4, 32), (8, 8))]
    with tempfile.TemporaryDirectory() as folder:
        settings = MeasurementSettings(calibration_images=32)
        runner = LocalRunner(Task("check", lambda: model, data, data), Path(folder), settings)
        recipes = [Recipe(steps) for steps in kinds]
        files = {recipe: packing.onnx_bytes(runner.build(recipe)) for recipe in recipes}
    return files, runner.builder.calibration[:5].numpy()


def _plain(target: Target) -> Iterator[str]:
    """The problems that can be seen without running anything."""
    if not isinstance(target.name, str) or not _NAME.fullmatch(target.name):
        yield f"name = {target.name!r}: use letters, digits and -_. only (at most 100, a letter or digit first)"
    if not all(isinstance(text, str) for pair in target.environment.items() for text in pair):
        yield f"environment = {target.environment!r}: it must lead from texts to texts"
    try:
        json.dumps(target.spec)
    except (TypeError, ValueError) as error:
        yield f"profile: it must be plain data that JSON can hold: {error}"


def _answer(target: Target, step: Step) -> str | TargetError | None:
    """What `supports` returns for a step, or the problem with that."""
    try:
        answer = target.supports(step)
    except Exception as error:  # whatever an author's function raises
        return TargetError(f"supports({step}) raised {_told(error)}; it must return None or the reason")
    if answer is None or (isinstance(answer, str) and answer.strip()):
        return answer
    return TargetError(f"supports({step}) returned {answer!r}; it must return None, or the reason as a text")


def _runs(target: Target, model: bytes, x: NDArray[Any], recipe: Recipe) -> Iterator[str]:
    """The problems of running a file that the target says it supports."""
    if target.milliseconds is not None:
        yield from _computes(target.milliseconds, model)
    try:
        network = target.load(model, 1)
    except Exception as error:
        yield f"supports() says that it runs, but load raised {_told(error)}"
        return
    expected = as_target(DEFAULT).load(model, 1)(x)
    before = x.copy()
    try:
        outputs, one, again = network(x), network(x[:1]), network(x)
    except Exception as error:
        yield f"the network raised {_told(error)} on a batch of {len(x)} or of 1; the batch size is open"
        return
    for made, count in ((outputs, len(x)), (one, 1)):
        if not isinstance(made, np.ndarray) or made.shape != (count, *expected.shape[1:]):
            shape = made.shape if isinstance(made, np.ndarray) else type(made).__name__
            yield f"outputs of {count} inputs are {shape}, not a NumPy array of shape {(count, *expected.shape[1:])}"
            return
    kept = outputs.copy()
    network(x[::-1].copy())
    if not np.array_equal(outputs, kept):
        yield "the next run overwrites the outputs of the last one; return a copy"
    if not np.array_equal(x, before):
        yield "a run changes its inputs"
    if not np.array_equal(kept, again):
        yield "two runs on the same inputs give different outputs"
    tolerance = _INT8 if any(step.activation_bits < 32 for step in recipe.of(Quantize)) else _FLOAT
    apart = float(np.abs(kept - expected).max()) / float(np.abs(expected).max())
    if not apart <= tolerance:
        yield f"outputs differ from ONNX Runtime's by {apart:.2g} of the largest, more than {tolerance:g}"
    yield from _threads(target, network, x, kept)


def _threads(target: Target, network: Network, x: NDArray[Any], expected: NDArray[Any]) -> Iterator[str]:
    """The problems of calls from several threads at once, and of `calling_thread`."""
    wrong: list[str] = []

    def call() -> None:
        try:
            if any(not np.array_equal(network(x), expected) for _ in range(20)):
                wrong.append("called from two threads at once it gives other outputs")
        except Exception as error:
            wrong.append(f"called from two threads at once it raised {_told(error)}")

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    yield from wrong
    if target.calling_thread:
        own, everybody, end = time.thread_time(), time.process_time(), time.perf_counter() + _SECONDS
        while time.perf_counter() < end:
            network(x)
        own, everybody = time.thread_time() - own, time.process_time() - everybody
        if own < everybody / 2:
            yield (
                f"calling_thread = True, but of its CPU time with one thread only {100 * own / everybody:.0f}% "
                "is the calling thread's; "
                "set it to False"
            )


def _computes(milliseconds: Any, model: bytes) -> Iterator[str]:
    """The problems of a latency that is computed."""
    try:
        one, again, eight = milliseconds(model, 1), milliseconds(model, 1), milliseconds(model, 8)
    except Exception as error:
        yield f"supports() says that it runs, but milliseconds raised {_told(error)}"
        return
    if not all(isinstance(value, float) and 0 < value < math.inf for value in (one, eight)):
        yield f"milliseconds gave {one!r} and {eight!r} for batches of 1 and 8; it must give finite numbers above 0"
    elif one != again:
        yield f"milliseconds gave {one!r} and then {again!r} for the same file; what is computed must be exact"
    elif eight < one:
        yield f"milliseconds gave {one!r} for one input and less, {eight!r}, for eight"


def _refuses(target: Target) -> Iterator[str]:
    """The problems of loading a file that cannot be run, which must fail one candidate and no more."""
    try:
        target.load(b"no ONNX file", 1)
        yield "load took bytes that are no ONNX file; it must raise ExportFailed"
    except ExportFailed:
        return
    except Exception as error:
        yield (
            f"load of bytes that are no ONNX file raised {_told(error)}; it must raise ExportFailed, which fails "
            "one candidate and no study"
        )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
