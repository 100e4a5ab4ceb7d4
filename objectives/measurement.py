"""Measured numbers with their intervals. The unit is in the name: `latency_ms`, `size_bytes`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval.

    Attributes:
        value: The value.
        low: The lower end of the interval; `value` for an exact number.
        high: The upper end.
        n: The number of observations (images, timed pairs); 0 for an exact number.
    """

    value: float
    low: float
    high: float
    n: int = 0

    @classmethod
    def exact(cls, value: float) -> Estimate:
        return cls(float(value), float(value), float(value))

    def times(self, factor: float) -> Estimate:
        """The estimate multiplied by a factor, such as 1e3 from seconds to milliseconds."""
        return Estimate(factor * self.value, factor * self.low, factor * self.high, self.n)

    @classmethod
    def rate(cls, hits: float, n: int) -> Estimate:
        """The share of `hits` among `n`, with Wilson's interval (Wilson 1927), which is also valid at 0 and 1.

        >>> metric = Estimate.rate(90, 100)
        >>> round(metric.low, 4), round(metric.high, 4)
        (0.8256, 0.9448)
        """
        p, z2 = hits / n, Z95 * Z95
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        # At 0 and 1 one end of the interval is the value itself, up to rounding.
        return cls(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n)

    @classmethod
    def of(cls, scores: NDArray[np.float64]) -> Estimate:
        """The mean of the scores of all samples, with Wilson's interval if all are 0 or 1, else a normal interval.

        >>> Estimate.of(np.array([1.0, 0.0, 1.0, 1.0])) == Estimate.rate(3, 4)
        True
        """
        if ((scores == 0) | (scores == 1)).all():
            return cls.rate(float(scores.sum()), len(scores))
        return cls.mean(float(scores.sum()), float((scores * scores).sum()), len(scores))

    @classmethod
    def mean(cls, total: float, total_of_squares: float, n: int) -> Estimate:
        """The mean of `n` scores with a normal interval, from their sum and their sum of squares."""
        value = total / n
        variance = max(0.0, total_of_squares / n - value * value) * (n / (n - 1) if n > 1 else 1.0)
        half = Z95 * math.sqrt(variance / n)
        return cls(value, value - half, value + half, n)


@dataclass(frozen=True)
class Measurement:
    """The result of one run of a recipe.

    Attributes:
        metrics: The estimates by the name of the metric.
        seconds: The time of each phase by its name.
        environment: Versions and devices by name.
        fidelity: How completely the recipe was evaluated.
    """

    metrics: Mapping[str, Estimate]
    seconds: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    fidelity: str = "full"

    def value(self, name: str) -> float:
        """The value of one metric."""
        return self.metrics[name].value

    @property
    def values(self) -> dict[str, float]:
        """The values by name, without their intervals."""
        return {name: metric.value for name, metric in self.metrics.items()}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        metrics = {name: Estimate(**entry) for name, entry in data["metrics"].items()}
        return cls(metrics, data.get("seconds", {}), data.get("environment", {}), data.get("fidelity", "full"))


def flat(metrics: Mapping[str, Estimate]) -> dict[str, float]:
    """Values by name for tables, with `_low` and `_high` where there is an interval.

    >>> flat({"size_bytes": Estimate.exact(10), "accuracy": Estimate(0.9, 0.8, 0.95, 40)})
    {'size_bytes': 10.0, 'accuracy': 0.9, 'accuracy_low': 0.8, 'accuracy_high': 0.95}
    """
    row: dict[str, float] = {}
    for name, metric in metrics.items():
        row[name] = metric.value
        if metric.low != metric.high:
            row[f"{name}_low"], row[f"{name}_high"] = metric.low, metric.high
    return row
