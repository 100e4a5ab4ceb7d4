"""Objectives, which a search optimizes, and limits, which every candidate must keep."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..errors import ConfigError
from .display import is_rate, show

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_Value = TypeVar("_Value", float, "NDArray[np.float64]")
COSTS = ("size_bytes", "latency_ms", "macs")
_UNITS = {
    "size_bytes": {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
    "latency_ms": {"us": 1e-3, "ms": 1.0, "s": 1e3},
    "macs": {"K": 1e3, "M": 1e6, "G": 1e9},
}
_LIMIT = re.compile(
    r"""
    ^\s* (?P<metric> [A-Za-z_]\w*)
    \s* (?P<sign> <=|>=)
    \s* (?P<number> [-+]? (?:\d[\d_]*\.?\d* | \.\d+) (?:[eE][-+]?\d+)?)
    \s* (?P<unit> %|[A-Za-z]*) \s*$
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class Objective:
    """A metric and the direction in which it gets better.

    >>> Objective.parse("size_bytes").maximize, Objective.parse("accuracy").maximize
    (False, True)
    """

    metric: str
    maximize: bool

    @classmethod
    def parse(cls, text: str) -> Objective:
        """The objective of a text: `accuracy`, `max accuracy` or `min size_bytes`.

        Without a direction the costs (`COSTS`) are minimized and all other metrics are maximized.

        Raises:
            ConfigError: For any other text.
        """
        words = text.split()
        if words and words[-1].isidentifier() and words[-1] not in ("min", "max"):
            if len(words) == 2 and words[0] in ("min", "max"):
                return cls(words[1], words[0] == "max")
            if len(words) == 1:
                return cls(words[0], words[0] not in COSTS)
        raise ConfigError(f"objective {text!r}: write a metric, or 'min METRIC' or 'max METRIC'")

    def loss(self, value: float, baseline: float) -> float:
        """A number to minimize, relative to the baseline.

        Args:
            value: The candidate's value.
            baseline: The baseline's value.

        Returns:
            For a metric to minimize, its share of the baseline's: 1 is as expensive. For a metric to maximize, the
            share of the baseline's that is lost: 1 is a metric of zero, and below 0 the metric is better than the
            baseline's.
        """
        scale = abs(baseline) or 1.0
        return (baseline - value) / scale if self.maximize else value / scale


@dataclass(frozen=True)
class Limit:
    """One limit on one metric.

    Attributes:
        text: The limit as the user wrote it.
        metric: The name of the metric.
        upper: Whether the limit is an upper one (`<=`).
        value: The number, in bytes, milliseconds, multiply-adds or the metric's own unit; per cents are shares of 1.
        kind: What the number is: `absolute`, a `share` of the baseline's, or a `difference` from it (a signed per
            cent). A difference is in points for a metric (`accuracy >= -1%` is the baseline's less 0.01) and relative
            for a cost (`size_bytes <= -75%` is a quarter of the baseline's).
    """

    text: str
    metric: str
    upper: bool
    value: float
    kind: str

    @classmethod
    def parse(cls, text: str) -> Limit:
        """The limit of a text `METRIC <= NUMBER[UNIT]` or `METRIC >= NUMBER[UNIT]`.

        Raises:
            ConfigError: The text has another form, or the number makes no sense for the metric.

        >>> Limit.parse("size_bytes <= 25%").resolve(1000.0)
        250.0
        >>> round(Limit.parse("accuracy >= -1%").resolve(0.95), 4)
        0.94
        """
        match = _LIMIT.match(text)
        if not match:
            raise ConfigError(
                f"limit {text!r}: write METRIC <= NUMBER or METRIC >= NUMBER, such as 'size_bytes <= 25%', "
                "'latency_ms <= 4', 'accuracy >= -1%'"
            )
        metric, unit, number = match["metric"], match["unit"], match["number"]
        upper = match["sign"] == "<="
        amount = float(number.replace("_", ""))
        if unit == "%":
            signed = number[0] in "+-"
            if not signed and metric not in COSTS:
                raise ConfigError(
                    f"limit {text!r}: {number}% of what? Write {amount / 100:g} for an absolute limit, or a "
                    "signed number such as -1% for points relative to the baseline"
                )
            limit = cls(text.strip(), metric, upper, amount / 100, "difference" if signed else "share")
        else:
            allowed = _UNITS.get(metric, {})
            if unit and unit not in allowed:
                raise ConfigError(
                    f"limit {text!r}: unknown unit {unit!r} for {metric}; choose from {', '.join((*allowed, '%'))}"
                )
            limit = cls(text.strip(), metric, upper, amount * allowed.get(unit, 1.0), "absolute")
            if is_rate(metric) and not 0 <= amount <= 1:
                raise ConfigError(
                    f"limit {text!r}: {metric} lies between 0 and 1; write a number such as 0.9, or a signed "
                    "percentage such as -1% for points relative to the baseline"
                )
        if metric in COSTS and limit.resolve(1.0) <= 0:
            raise ConfigError(f"limit {text!r}: {metric} is always above zero, and this limit is not")
        return limit

    def resolve(self, baseline: float) -> float:
        """The absolute limit for a baseline."""
        if self.kind == "absolute":
            return self.value
        if self.kind == "share":
            return self.value * baseline
        return baseline * (1 + self.value) if self.metric in COSTS else baseline + self.value

    def excess(self, value: _Value, baseline: float) -> _Value:
        """By what share of the limit a value (or each value of an array) exceeds it; 0 or less keeps the limit."""
        limit = self.resolve(baseline)
        excess = (value - limit if self.upper else limit - value) / (abs(limit) or 1.0)
        # 0.905 is 1 point less than 0.915, but not in binary; a value at the limit keeps it. (Adding 0.0 turns -0
        # into 0.)
        return excess * (abs(excess) >= 1e-12) + 0.0


@dataclass(frozen=True)
class Budget:
    """All limits; a candidate must keep every one."""

    limits: tuple[Limit, ...] = ()

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Budget:
        """The budget of one or more texts, as for `Limit.parse`.

        Raises:
            ConfigError: Some texts are not valid; one error has the problems of all.
        """
        limits, problems = [], []
        for text in [texts] if isinstance(texts, str) else texts:
            try:
                limits.append(Limit.parse(text))
            except ConfigError as error:
                problems += error.problems
        by_side: dict[tuple[str, bool], list[str]] = {}
        for limit in limits:
            by_side.setdefault((limit.metric, limit.upper), []).append(repr(limit.text))
        problems += [f"limits {' and '.join(same)}: keep one of them" for same in by_side.values() if len(same) > 1]
        if problems:
            raise ConfigError(problems)
        return cls(tuple(limits))

    def excess(self, values: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float]:
        """The excess over each limit whose metric is in `values`, by the text of the limit."""
        return {
            limit.text: limit.excess(values[limit.metric], baseline[limit.metric])
            for limit in self.limits
            if limit.metric in values
        }

    def describe(self, baseline: Mapping[str, float]) -> list[str]:
        """A line per limit, with the absolute limit for this baseline."""
        lines = []
        for limit in self.limits:
            bound = show(limit.metric, limit.resolve(baseline[limit.metric]))
            lines.append(limit.text if limit.kind == "absolute" else f"{limit.text}  (= {bound})")
        return lines
