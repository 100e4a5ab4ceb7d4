"""Numbers formatted for people, and which of them a report shows."""

from __future__ import annotations

from dataclasses import dataclass

from ...objectives.display import against, show, spread
from ...objectives.measurement import Estimate
from ...objectives.objective import COSTS
from ...spaces.recipe import Recipe
from ..candidate import Candidate
from ..front import Front

_HEADINGS = {"size_bytes": "size", "zstd_bytes": "size, zstd", "latency_ms": "latency", "macs": "MACs"}


def heading(metric: str) -> str:
    """The heading of a metric's column."""
    return _HEADINGS.get(metric, metric)


@dataclass(frozen=True)
class Cell:
    """One formatted number; all parts are empty where it is not known.

    Args:
        value: The value with its unit, such as `94.40%`.
        interval: Its 95% interval, such as `[92.8%, 95.7%]`.
        spread: Half the width of the interval, such as `±1.43`.
        beside: The comparison with the baseline, such as `14% of baseline` or `2.1x faster`.
    """

    value: str = ""
    interval: str = ""
    spread: str = ""
    beside: str = ""

    @classmethod
    def of(cls, metric: str, estimate: Estimate | None, beside: str = "") -> Cell:
        """An estimate in the unit of its metric.

        >>> Cell.of("size_bytes", Estimate.exact(19_000), "19% of baseline")
        Cell(value='19 kB', interval='', spread='', beside='19% of baseline')
        """
        if estimate is None:
            return cls(beside=beside)
        value, interval = show(metric, estimate.value), ""
        if estimate.low != estimate.high:
            interval = f"[{show(metric, estimate.low)}, {show(metric, estimate.high)}]"
        return cls(value, interval, spread(metric, estimate), beside)

    @property
    def text(self) -> str:
        """The value and its interval; a dash where it is not known."""
        return f"{self.value or '-'} {self.interval}".rstrip()


def costs_of(front: Front) -> list[str]:
    """The costs that were measured, without the quality metric.

    MACs are included only where an objective or a limit uses them, or where no other cost was measured.
    """
    quality = front.quality
    known = [name for name in ("size_bytes", "latency_ms") if name in front.baseline.metrics and name != quality]
    wanted = [o.metric for o in front.objectives if o.metric in COSTS] + [x.metric for x in front.budget.limits]
    if "macs" in front.baseline.metrics and quality != "macs" and ("macs" in wanted or not known):
        known.append("macs")
    return known


def is_trivial(candidate: Candidate) -> bool:
    """Whether a candidate is a reference recipe such as all weights at 8 bits; the original model does not count."""
    return bool(candidate.label) and candidate.recipe != Recipe()


def measured(candidate: Candidate, metric: str) -> Estimate | None:
    """A metric as the trial measured it; None where it did not."""
    return candidate.measurement.metrics.get(metric) if candidate.measurement else None


def final(candidate: Candidate, metric: str) -> Estimate | None:
    """A metric in its most precise measurement: a finalist's latency is the one from the clean process."""
    estimate = measured(candidate, metric)
    return candidate.test.get(metric, estimate) if metric == "latency_ms" else estimate


def beside(front: Front, member: Candidate, metric: str) -> str:
    """A member's number compared with the baseline's: `14% of baseline`, `2.1x faster`."""
    if metric == "latency_ms" and (pair := front.latency(member)):
        return against(metric, *pair)
    estimate, base = measured(member, metric), front.baseline.metrics.get(metric)
    return against(metric, estimate, base) if estimate and base else ""


def difference(front: Front, member: Candidate) -> str:
    """The paired difference to the baseline on the test split: `-0.56 ±1.20`, in points for an accuracy."""
    name = f"{front.quality}_difference"
    estimate = member.test.get(name)
    if estimate is None:
        return ""
    return f"{show(name, estimate.value).removesuffix(' points')} {spread(name, estimate)}".rstrip()
