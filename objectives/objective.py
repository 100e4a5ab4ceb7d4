"""What is good: objectives to pursue and limits to keep."""

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
            if is_rate(metric) and not 0 <= amount <= 1:
                raise ConfigError(
                    f"limit {text!r}: {metric} lies between 0 and 1; write a number such as 0.9, or a signed "
                    "percentage such as -1% for points relative to the baseline"
                )
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
