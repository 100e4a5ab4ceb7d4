"""The data of the plots: the metric over each cost, and the hypervolume after each candidate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...objectives.display import against, is_rate
from ...objectives.measurement import Estimate
from ...objectives.pareto import hypervolume, nondominated
from ...spaces.recipe import Recipe
from ..candidate import OK, OVER_BUDGET, Candidate
from ..front import Front
from .cells import Cell, costs_of, heading, is_trivial, measured

ORIGINAL = "original model"
# The roles of a point on a plot: legend, color, plotly's and matplotlib's marker.
ROLES = {
    "other": ("candidate", "#9aa5b1", "circle", "o"),
    OVER_BUDGET: ("over budget", "#d1495b", "circle-open", "o"),
    "trivial": ("trivial baseline", "#e09f3e", "diamond", "D"),
    "front": ("front", "#0b6e99", "circle", "o"),
    "baseline": (ORIGINAL, "#1f2933", "star", "*"),
}
FAINT = ("other", OVER_BUDGET)


@dataclass(frozen=True)
class Point:
    """One candidate, or the baseline, on one panel.

    Args:
        role: A key of the legend, which decides color and marker.
        number: The candidate's number.
        x: The cost.
        y: The metric.
        label: The text next to the point. All further texts are shown on hover.
        name: The candidate's name.
        remark: The candidate's label.
        what: Its recipe in one line.
        numbers: Its metrics.
        outcome: Why it is not inside the budget; empty for a candidate that is.
    """

    role: str
    number: int
    x: Estimate
    y: Estimate
    label: str
    name: str
    remark: str
    what: str
    numbers: tuple[str, ...]
    outcome: str


@dataclass(frozen=True)
class Panel:
    """One plot: the metric over one cost.

    Args:
        x: The cost.
        y: The metric.
        points: The baseline and the candidates that were measured on both axes.
        stairs: The corners of the front from left to right.
        limits: Axis, text and value of each limit on one of the axes.
        window: The ends of the visible part of the y axis.
        span: The ends of the x axis.
        up: Whether more of the metric is better.
        percent: Whether the metric is a share, shown as a percentage.
        knee: The number of the knee; -1 where the front is empty.
    """

    x: str
    y: str
    points: tuple[Point, ...]
    stairs: tuple[tuple[float, float], ...]
    limits: tuple[tuple[str, str, float], ...]
    window: tuple[float, float]
    span: tuple[float, float]
    up: bool
    percent: bool
    knee: int

    @property
    def log(self) -> bool:
        """Whether the x axis is logarithmic, as it is where the costs span more than a factor of six."""
        return self.span[0] > 0 and self.span[1] / self.span[0] > 6

    @property
    def pad(self) -> float:
        """The margin next to the points on a linear x axis."""
        return 0.06 * ((self.span[1] - self.span[0]) or abs(self.span[1]) or 1.0)

    @property
    def x_title(self) -> str:
        titles = {"size_bytes": "size of the shipped file", "latency_ms": "latency", "macs": "multiply-adds"}
        return titles.get(self.x, self.x)

    def of(self, role: str) -> list[Point]:
        return [point for point in self.points if point.role == role]

    def inside(self, point: Point) -> bool:
        """Whether a point lies in the window."""
        return self.window[0] <= point.y.value <= self.window[1]


@dataclass(frozen=True)
class Plots:
    """The panels, and the curve of the hypervolume: a candidate's number, and the volume after it."""

    panels: tuple[Panel, ...]
    curve: tuple[tuple[int, float], ...]


def plots_of(front: Front) -> Plots:
    """The data of the plots; at most two panels."""
    quality = front.quality
    panels = [_panel(front, cost, quality) for cost in costs_of(front)[:2] if quality in front.baseline.metrics]
    numbers = [candidate.number for candidate in front.candidates]
    return Plots(tuple(panels), tuple(zip(numbers, hypervolume_curve(front), strict=True)))


def hypervolume_curve(front: Front) -> list[float]:
    """The front's hypervolume after each candidate, in the order of `front.candidates`."""
    best: list[list[float]] = []
    volume, curve = 0.0, []
    for candidate in front.candidates:
        if candidate.state == OK and candidate.measurement is not None:
            point = front.losses(candidate)
            if not any(all(a <= b for a, b in zip(other, point, strict=True)) for other in best):
                best.append(point)
                best = [p for p, keep in zip(best, nondominated(best), strict=True) if keep]
                volume = hypervolume(best, [1.0] * len(front.objectives))
        curve.append(volume)
    return curve


def _panel(front: Front, x: str, y: str) -> Panel:
    base = front.baseline.metrics
    points = (*_points(front, x, y), _start(front, x, y))
    limits = tuple(
        (axis, limit.text, limit.resolve(base[metric].value))
        for axis, metric in (("x", x), ("y", y))
        for limit in front.budget.limits
        if limit.metric == metric
    )
    up = front.maximizes(y)
    xs = [p.x.value for p in points] + [value for axis, _, value in limits if axis == "x"]
    return Panel(
        x=x,
        y=y,
        points=points,
        stairs=_stairs(front, points, up),
        limits=limits,
        window=_window(points, base[y].value, up, [value for axis, _, value in limits if axis == "y"]),
        span=(min(xs), max(xs)),
        up=up,
        percent=is_rate(y),
        knee=front.knee().number if front.members else -1,
    )


def _points(front: Front, x: str, y: str) -> Iterator[Point]:
    """The candidates that were measured on both axes."""
    members = {member.number for member in front.members}
    for c in front.candidates:
        mx, my = measured(c, x), measured(c, y)
        if mx is None or my is None or not (math.isfinite(mx.value) and math.isfinite(my.value)):
            continue
        if c.recipe == Recipe() and c.number not in members:
            continue  # drawn as the baseline's star
        role = "front" if c.number in members else "trivial" if is_trivial(c) and c.state == OK else c.state
        yield Point(
            role=role if role in ROLES else "other",
            number=c.number,
            x=mx,
            y=my,
            label=c.label if is_trivial(c) else "",
            name=f"#{c.number}",
            remark=c.label,
            what=c.recipe.describe(),
            numbers=tuple(_numbers(front, c)),
            outcome="" if c.state == OK else f"{c.state}: {' '.join(c.reason.split())}",
        )


def _start(front: Front, x: str, y: str) -> Point:
    base = front.baseline.metrics
    numbers = [f"{heading(n)} {Cell.of(n, base[n]).text}" for n in (y, *costs_of(front)) if n in base]
    return Point("baseline", -1, base[x], base[y], "", f"the {ORIGINAL}", "", "", tuple(numbers), "")


def _numbers(front: Front, candidate: Candidate) -> Iterator[str]:
    base = front.baseline.metrics
    for name in (front.quality, *costs_of(front)):
        estimate = measured(candidate, name)
        if estimate is not None and name in base:
            yield f"{heading(name)} {Cell.of(name, estimate).text}, {against(name, estimate, base[name])}"
    for name, estimate in candidate.test.items():
        yield f"test {name} {Cell.of(name, estimate).text}"


def _stairs(front: Front, points: Sequence[Point], up: bool) -> tuple[tuple[float, float], ...]:
    """The points inside the budget that are nondominated on this panel."""
    inside = {c.number for c in front.candidates if c.state == OK}
    ok = [p for p in points if p.number in inside]
    keep = nondominated([[p.x.value, -p.y.value if up else p.y.value] for p in ok])
    return tuple(sorted({(p.x.value, p.y.value) for p, kept in zip(ok, keep, strict=True) if kept}))


def _window(points: Sequence[Point], base: float, up: bool, limits: Sequence[float]) -> tuple[float, float]:
    """The part of the y axis to draw.

    Candidates far below the baseline would compress all others into a line; they are drawn at the edge instead.
    """

    def near(point: Point) -> bool:
        loss = (base - point.y.value) * (1 if up else -1)
        return loss <= (0.2 if point.role == "front" else 0.08) * (abs(base) or 1.0) * (1 if up else 5)

    ends = [end for p in points if near(p) for end in (p.y.low, p.y.high)] + list(limits)
    low, high = min(ends), max(ends)
    pad = 0.06 * ((high - low) or abs(high) or 1.0)
    return low - pad, high + pad


def bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """The distances of the ends of the intervals below and above the values, as error bars need them."""
    return [[max(0.0, e.value - e.low) for e in estimates], [max(0.0, e.high - e.value) for e in estimates]]


def log_ticks(panel: Panel) -> list[float]:
    """Round numbers along a logarithmic x axis, few enough to stay legible."""
    low, high = panel.span
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for subs in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**d for d in decades for s in subs if low * 0.8 <= s * 10.0**d <= high * 1.3]
        if len(ticks) <= 7:
            break
    return ticks


def linear_ticks(low: float, high: float) -> Iterator[float]:
    """A few round numbers between `low` and `high`."""
    step = 10.0 ** math.floor(math.log10((high - low) or abs(high) or 1.0))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if (high - low) / s <= 7)
    number = math.ceil(low / step)
    while number * step <= high:
        yield number * step
        number += 1
