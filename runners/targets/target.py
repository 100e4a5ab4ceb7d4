"""Where a network is deployed: the hardware and the runtime on which latency and accuracy are measured.

A `Target` is a few functions under a name. The protocol is this small on purpose: whoever can turn the bytes of an ONNX
file into a function of arrays has a target, and everything else (pairs, medians, intervals, scores) is done here in the
same way for all. A target without a device at hand, such as the roofline of a profile (`roofline.analytic`), computes
milliseconds from the file instead of timing it.

The targets that have a name are in `catalog`; the docstring of each one's file says what it is good for and what to
know of it. ExecuTorch is no target: it compiles torch programs and not the ONNX file that ships, and what it compiled
of a CIFAR ResNet did not run (`slice_copy: tensors have different dim orders`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from ...objectives.measurement import Estimate
from ...spaces.steps import Step
from . import latency as measure

Network = Callable[[NDArray[Any]], NDArray[Any]]


def everything(step: Step) -> str | None:
    """The `supports` of a target that runs every step: there is no reason against any."""
    return None


@dataclass(frozen=True)
class Target:
    """Something that runs ONNX files, or that knows how long they take.

    Attributes:
        name: Letters, digits and `-_.`; results are filed under it.
        load: From the bytes of an ONNX file and a number of CPU threads to a function from a batch of inputs to
            outputs. Several threads may call that function at once. Raises `ExportFailed` for a file that cannot run.
        supports: Why a step of a recipe cannot run there, None when it can. A study asks this of its whole space before
            the first trial.
        milliseconds: Of a run of an ONNX file on a batch of so many inputs, where that is computed; None: it is timed.
        calling_thread: Whether, with one thread, everything is computed in the thread that calls. Then the CPU time of
            that thread is measured, otherwise the wall clock.
        environment: Versions and devices, for the record.
        profile: For a target that has no name in `catalog.TARGETS`: plain data that `as_target` makes it from.
        int8_products: Whether products of two activations (those of attention) are faster in int8 than in floats. The
            files for such a target have them in int8 where the projections have 8-bit activations, and quantize the
            inputs of linear layers over tokens symmetrically where that costs little (`onnx_export`).

        >>> check_target(Target("mine", load=lambda model, threads: my_runtime(model).run))  # doctest: +SKIP
    """

    name: str
    load: Callable[[bytes, int], Network]
    supports: Callable[[Step], str | None] = everything
    milliseconds: Callable[[bytes, int], float] | None = None
    calling_thread: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    profile: Mapping[str, Any] | None = None
    int8_products: bool = False

    @property
    def spec(self) -> str | dict[str, Any]:
        """What `catalog.as_target` makes the target from: its name, or its profile. JSON can hold either."""
        return self.name if self.profile is None else dict(self.profile)

    def latency(
        self,
        candidate: bytes,
        baseline: Network,
        batch: NDArray[Any],
        baseline_ms: float | None = None,
        seconds: float = 0.5,
        threads: int = 1,
    ) -> tuple[Estimate, Estimate]:
        """`(milliseconds, ratio to the baseline)` of an ONNX file: see `measure.latency`; exact where computed."""
        if self.milliseconds is not None:
            ms = self.milliseconds(candidate, len(batch))
            return Estimate.exact(ms), Estimate.exact(ms / (baseline_ms or ms))
        return self._paired(self.load(candidate, threads), baseline, batch, baseline_ms, seconds, threads)

    def baseline_latency(
        self, baseline: bytes, batch: NDArray[Any], seconds: float = 0.5, threads: int = 1
    ) -> Estimate:
        """The milliseconds of the file that all others are compared with.

        Measured twice; the interval covers the intervals of both measurements.
        """
        if self.milliseconds is not None:
            return Estimate.exact(self.milliseconds(baseline, len(batch)))
        network = self.load(baseline, threads)
        (a, _), (b, _) = (self._paired(network, network, batch, None, seconds, threads) for _ in range(2))
        return Estimate((a.value + b.value) / 2, min(a.low, b.low), max(a.high, b.high), a.n + b.n)

    def _paired(
        self,
        candidate: Network,
        baseline: Network,
        batch: NDArray[Any],
        baseline_ms: float | None,
        seconds: float,
        threads: int,
    ) -> tuple[Estimate, Estimate]:
        clock = time.thread_time_ns if threads == 1 and self.calling_thread else time.perf_counter_ns
        return measure.latency(candidate, baseline, batch, baseline_ms, seconds, clock)
