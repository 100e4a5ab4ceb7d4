"""Where a network is deployed: the hardware and the runtime on which latency and accuracy are measured.

A `Target` is a few functions under a name. The protocol is small on purpose: a function that turns the bytes of an ONNX
file into a function of arrays makes a target, and everything else (pairs, medians, intervals, scores) is the same for
all targets. A target without a device, such as the roofline of a profile (`roofline.analytic`), computes the
milliseconds from the file instead of timing it.

The targets that have a name are in `catalog`; the module of each one describes its strengths and limits. ExecuTorch is
not among them: it compiles torch programs and not the ONNX file that ships, and the CIFAR ResNet that it compiled did
not run (`slice_copy: tensors have different dim orders`).
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
    """The `supports` of a target that runs every step."""
    return None


@dataclass(frozen=True)
class Target:
    """Something that runs ONNX files, or that knows how long they take.

    Attributes:
        name: Letters, digits and `-_.`; results are filed under it.
        load: `load(model, threads)` gets the bytes of an ONNX file and the number of CPU threads, and returns a
            function from a batch of inputs to outputs, which several threads may call at once. It raises `ExportFailed`
            for a file that cannot run.
        supports: `supports(step)` returns why a step of a recipe cannot run there, None when it can. A study calls it
            for its whole space before the first trial.
        milliseconds: `milliseconds(model, batch)` computes the milliseconds of a run of an ONNX file on so many inputs;
            None: runs are timed.
        calling_thread: Whether, with one thread, everything is computed in the thread that calls. Then the CPU time of
            that thread is measured, otherwise the wall clock.
        environment: Versions and devices, for the record.
        profile: Plain data that `as_target` makes the target from, if it has no name in `catalog.TARGETS`.
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
        """What `catalog.as_target` makes the target from, its name or its profile; either can be stored as JSON."""
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
        """The latency of an ONNX file, see `targets.latency.latency`; exact where it is computed.

        Args:
            candidate: The bytes of the file.
            baseline: The loaded baseline.
            batch: The inputs of each run.
            baseline_ms: The baseline's milliseconds, one number for a whole study; None: as measured here.
            seconds: How long to measure.
            threads: CPU threads of the candidate.

        Returns:
            `(milliseconds, ratio to the baseline)`
        """
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
