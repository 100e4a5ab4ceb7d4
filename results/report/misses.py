"""By how much a candidate misses the budget, and the limits it would keep."""

from __future__ import annotations

import math
from collections.abc import Callable

from ...objectives.display import show
from ...objectives.objective import COSTS, Limit
from ..candidate import OVER_BUDGET, Candidate
from ..front import Front


def nearest(front: Front, count: int) -> list[Candidate]:
    """The candidates over the budget with the smallest excess; unmeasured ones where none was measured."""
    over = [c for c in front.candidates if c.state == OVER_BUDGET and c.excess]
    return front.least_violating(count) or sorted(over, key=lambda c: (c.violation, c.number))[:count]


def misses(front: Front, candidate: Candidate) -> list[tuple[str, str]]:
    """For each limit that a candidate exceeds: by how much, and the limit it would keep."""
    out = []
    for limit in front.budget.limits:
        excess = candidate.excess.get(limit.text, 0.0)
        if excess > 0:
            base = front.baseline.value(limit.metric)
            bound = limit.resolve(base)
            # A recipe rejected by its predicted cost was never measured; its predicted value follows from the excess.
            value = bound + (excess if limit.upper else -excess) * (abs(bound) or 1.0)
            word = "over" if limit.upper else "under"
            missed = f"{show(limit.metric, value)}, {100 * excess:.3g}% {word} {limit.text}"
            out.append((missed, needed(limit, value, base)))
    return out


def needed(limit: Limit, value: float, baseline: float) -> str:
    """The tightest limit of the same kind that a value keeps.

    >>> needed(Limit.parse("size_bytes <= 25%"), 273.0, 1000.0), needed(Limit.parse("accuracy >= -1%"), 0.93, 0.95)
    ('size_bytes <= 27.3%', 'accuracy >= -2%')
    """
    unit, scale = "", 1.0
    if limit.kind == "share":
        amount, unit = 100 * value / baseline, "%"
    elif limit.kind == "difference":
        amount, unit = 100 * ((value / baseline - 1) if limit.metric in COSTS else value - baseline), "%"
    elif limit.metric == "size_bytes":
        unit, scale = next(((u, s) for u, s in (("MB", 1e6), ("kB", 1e3)) if value >= s), ("B", 1.0))
        amount = value / scale
    else:
        amount = value
    # Rounded to three digits, towards the side that keeps the value inside, and further where rounding errors need it.
    digits = 2 - math.floor(math.log10(abs(amount))) if amount else 2
    toward: Callable[[float], int] = math.ceil if limit.upper else math.floor
    start = toward(round(amount * 10**digits, 6))
    for step in range(4):
        number = (start + (step if limit.upper else -step)) / 10**digits
        sign = "+" if limit.kind == "difference" and number >= 0 else ""
        text = f"{limit.metric} {'<=' if limit.upper else '>='} {sign}{number:.15g}{unit}"
        if Limit.parse(text).excess(value, baseline) <= 0:
            return text
    return f"{limit.metric} {'<=' if limit.upper else '>='} {value!r}"
