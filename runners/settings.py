"""The measurement settings and their defaults, declared only here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .targets.catalog import DEFAULT, TARGETS


@dataclass(frozen=True)
class MeasurementSettings:
    """Everything but the task that decides how a file is measured.

    Args:
        threads: CPU threads of the runtime while latency is measured.
        batch: Inputs per call while latency is measured.
        seconds: Time spent on one latency measurement.
        calibration_images: Training inputs that set activation ranges and BatchNorm statistics.
        seed: Seed of every random draw of the work: calibration inputs, training, student weights.
        target: Name of the target, or the plain data of its profile; see `runners.targets`.
    """

    threads: int = 1
    batch: int = 1
    seconds: float = 0.5
    calibration_images: int = 512
    seed: int = 0
    target: str | Mapping[str, Any] = DEFAULT

    @property
    def runtime(self) -> str:
        """The name of the runtime that computes the outputs, for people."""
        name = self.target if isinstance(self.target, str) else DEFAULT
        return TARGETS[name].title if name in TARGETS else name


# The comparison of a finalist's file with the simulation of its graph.
PARITY_INPUTS = 1000  # inputs that are compared, or all if there are fewer
PARITY_AGREEMENT = 0.995  # the least share of equal predictions
PARITY_SECONDS = 20.0  # after which fewer inputs are compared
PARITY_DIFFERENCE = 0.05  # the largest mean difference of outputs without classes, as a share of the largest
