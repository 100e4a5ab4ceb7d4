"""What is good: objectives to pursue and limits to keep."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .measurement import Estimate

_Value = TypeVar("_Value", float, "NDArray[np.float64]")
COSTS = ("size_bytes", "latency_ms", "macs")
_UNITS = {
    "size_bytes": {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
    "latency_ms": {"us": 1e-3, "ms": 1.0, "s": 1e3},
    "macs": {"K": 1e3, "M": 1e6, "G": 1e9},
}
_SHARES = ("accuracy", "parity_agreement")
_LIMIT = re.compile(
    r"^\s*(?P<metric>[A-Za-z_]\w*)\s*(?P<sign><=|>=)\s*(?P<number>[-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(?P<unit>%|[A-Za-z]*)\s*$"
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
        """`accuracy`, `max accuracy`, `min size_bytes`; costs are minimised and all else is maximised unless it says."""
        words = text.split()
        if words and words[-1].isidentifier() and words[-1] not in ("min", "max"):
            if len(words) == 2 and words[0] in ("min", "max"):
                return cls(words[1], words[0] == "max")
            if len(words) == 1:
                return cls(words[0], words[0] not in COSTS)
        raise ConfigError(f"objective {text!r}: write a metric, or 'min METRIC' or 'max METRIC'")

    def loss(self, value: float, baseline: float) -> float:
        """A number to minimise: a cost as a share of the baseline's, or what share of the baseline's metric is lost.

        So 1 is a cost equal to the baseline's, or a metric of zero; a metric better than the baseline's is below 0.
        """
        scale = abs(baseline) or 1.0
        return (baseline - value) / scale if self.maximize else value / scale


@dataclass(frozen=True)
class Limit:
    """One limit. `value` is absolute, a share of the baseline, or (signed per cent) a difference from it.

    kind: `absolute`, `share` or `difference`. A difference is in points for a metric (`accuracy >= -1%` is the
    baseline less 0.01) and relative for a cost (`size_bytes <= -75%` is a quarter of the baseline).
    """

    text: str
    metric: str
    upper: bool
    value: float
    kind: str

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Raises `ConfigError` for anything but `METRIC <= NUMBER[UNIT]` or `METRIC >= NUMBER[UNIT]`.

        >>> Limit.parse("size_bytes <= 25%").resolve(1000.0)
        250.0
        >>> round(Limit.parse("accuracy >= -1%").resolve(0.95), 4)
        0.94
        """
        match = _LIMIT.match(text)
        if not match:
            raise ConfigError(f"limit {text!r}: write METRIC <= NUMBER or METRIC >= NUMBER, such as 'size_bytes <= 25%', "
                              "'latency_ms <= 4', 'accuracy >= -1%'")  # fmt: skip
        metric, unit, number = match["metric"], match["unit"], match["number"]
        upper = match["sign"] == "<="
        amount = float(number.replace("_", ""))
        if unit == "%":
            signed = number[0] in "+-"
            if not signed and metric not in COSTS:
                raise ConfigError(f"limit {text!r}: {number}% of what? Write {amount / 100:g} for an absolute limit, or a "
                                  "signed number such as -1% for points relative to the baseline")  # fmt: skip
            limit = cls(text.strip(), metric, upper, amount / 100, "difference" if signed else "share")
        else:
            allowed = _UNITS.get(metric, {})
            if unit and unit not in allowed:
                raise ConfigError(
                    f"limit {text!r}: unknown unit {unit!r} for {metric}; choose from {', '.join((*allowed, '%'))}"
                )
            limit = cls(text.strip(), metric, upper, amount * allowed.get(unit, 1.0), "absolute")
            if metric == "accuracy" and not 0 <= amount <= 1:
                raise ConfigError(f"limit {text!r}: accuracy lies between 0 and 1; write a number such as 0.9, or a signed "
                                  "percentage such as -1% for points relative to the baseline")  # fmt: skip
        if metric in COSTS and limit.resolve(1.0) <= 0:
            raise ConfigError(f"limit {text!r}: {metric} is always above zero, and this limit is not")
        return limit

    def resolve(self, baseline: float) -> float:
        """The absolute limit."""
        if self.kind == "absolute":
            return self.value
        if self.kind == "share":
            return self.value * baseline
        return baseline * (1 + self.value) if self.metric in COSTS else baseline + self.value

    def excess(self, value: _Value, baseline: float) -> _Value:
        """By what share of the limit it is exceeded, by one value or by each of many; <= 0 is inside."""
        limit = self.resolve(baseline)
        excess = (value - limit if self.upper else limit - value) / (abs(limit) or 1.0)
        # 0.905 is 1 point less than 0.915, but not in binary: a value at its limit keeps it. (The last 0 makes -0 a 0.)
        return excess * (abs(excess) >= 1e-12) + 0.0


@dataclass(frozen=True)
class Budget:
    """All limits; a candidate must keep every one."""

    limits: tuple[Limit, ...] = ()

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Budget:
        """Raises one `ConfigError` with the problems of all the texts."""
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
        """The excess of each limit whose metric is in `values`, by the limit's text."""
        return {
            limit.text: limit.excess(values[limit.metric], baseline[limit.metric])
            for limit in self.limits
            if limit.metric in values
        }

    def describe(self, baseline: Mapping[str, float]) -> list[str]:
        """Each limit with what it means for this baseline."""
        lines = []
        for limit in self.limits:
            bound = show(limit.metric, limit.resolve(baseline[limit.metric]))
            lines.append(limit.text if limit.kind == "absolute" else f"{limit.text}  (= {bound})")
        return lines


def show(metric: str, value: float) -> str:
    """A number for people: `41.2 kB`, `0.123 ms`, `97.3%`.

    >>> show("size_bytes", 41234), show("latency_ms", 0.1234), show("accuracy", 0.9731), show("macs", 40_560_000)
    ('41.2 kB', '0.123 ms', '97.31%', '40.6 M')
    """
    if value != value:
        return "-"
    if metric in _SHARES:
        return f"{100 * value:.2f}%"
    if metric == "accuracy_difference":
        return f"{100 * value:+.2f} points"
    if metric == "latency_ms":
        return f"{value:.3g} ms" if abs(value) < 999.5 else f"{value:.0f} ms"
    if metric == "macs" or metric.endswith("_bytes"):
        units = ("", "k", "M", "G", "T") if metric == "macs" else ("B", "kB", "MB", "GB", "TB")
        step = 0
        while abs(value) >= 999.5 and step < 4:
            value, step = value / 1000, step + 1
        return f"{value:.3g} {units[step]}".rstrip()
    return f"{value:.4g}"


def spread(name: str, metric: Estimate) -> str:
    """Half the interval, in the unit in which `show` gives the value."""
    if metric.low == metric.high:
        return ""
    half = (metric.high - metric.low) / 2
    return f"±{100 * half:.2f}" if name in (*_SHARES, "accuracy_difference") else f"±{half:.2g}"


def speed(latency: Estimate, base: Estimate) -> str:
    """What the intervals say of a latency beside another: `faster`, `slower`, or `same speed` where they overlap."""
    return "faster" if latency.high < base.low else "slower" if latency.low > base.high else "same speed"


def against(name: str, metric: Estimate, base: Estimate) -> str:
    """A number beside the baseline's: `14% of baseline`, `2.1x faster`, `-0.41 points`."""
    if name in ("latency_ms", "latency_ratio"):
        verdict = speed(metric, base)
        if verdict == "same speed":
            return verdict
        return f"{base.value / metric.value if verdict == 'faster' else metric.value / base.value:.2f}x {verdict}"
    if name in COSTS or name.endswith("_bytes"):
        return f"{100 * metric.value / base.value:.3g}% of baseline" if base.value else ""
    if name == "accuracy":
        return f"{100 * (metric.value - base.value):+.2f} points"
    return f"{metric.value - base.value:+.4g}"


def duration(seconds: float, exact: bool = False) -> str:
    """Seconds for people, with `exact` to a tenth where they are few.

    >>> duration(45.2), duration(125), duration(7260), duration(2.34, exact=True)
    ('45s', '2m05s', '2h01m', '2.3s')
    """
    if exact and seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"
