"""Numbers held against a budget: which limits are exceeded, and the error that says so."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import OverBudget
from .display import show
from .objective import Budget


def check_budget(
    budget: Budget,
    values: Mapping[str, float],
    baseline: Mapping[str, float],
    tolerance: Mapping[str, float] | None = None,
) -> None:
    """Raises `OverBudget` when a limit on one of these values is exceeded.

    Args:
        budget: The limits; those on metrics that are not in `values` are left out.
        values: Numbers by metric.
        baseline: The original network's numbers, which relative limits refer to.
        tolerance: By metric, what share of a limit may be exceeded, for values that are only predicted.
    """
    excess = budget.excess(values, baseline)
    allowed = {limit.text: (tolerance or {}).get(limit.metric, 0.0) for limit in budget.limits}
    over = {text: share for text, share in excess.items() if share > allowed[text]}
    if over:
        raise OverBudget(describe_excess(budget, values, over, baseline), excess)


def describe_excess(
    budget: Budget, values: Mapping[str, float], over: Mapping[str, float], baseline: Mapping[str, float]
) -> str:
    """For people: each exceeded limit (those in `over`) with the value beside its bound."""
    texts = []
    for limit in budget.limits:
        if limit.text in over:
            bound = show(limit.metric, limit.resolve(baseline[limit.metric]))
            value = show(limit.metric, values[limit.metric])
            texts.append(f"{limit.metric} {value} against a limit of {bound} ({limit.text})")
    return "; ".join(texts)
