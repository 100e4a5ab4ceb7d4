"""Comparison of numbers with a budget: which limits are exceeded, and the error that reports them."""

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
    """Check that values keep all limits.

    Args:
        budget: The limits; those on metrics that are not in `values` are not checked.
        values: The value of each metric.
        baseline: The original model's numbers, which relative limits refer to.
        tolerance: For each metric, by what share a limit may be exceeded, for values that are only predicted.

    Raises:
        OverBudget: A limit is exceeded.
    """
    excess = budget.excess(values, baseline)
    allowed = {limit.text: (tolerance or {}).get(limit.metric, 0.0) for limit in budget.limits}
    over = {text: share for text, share in excess.items() if share > allowed[text]}
    if over:
        raise OverBudget(describe_excess(budget, values, over, baseline), excess)


def describe_excess(
    budget: Budget, values: Mapping[str, float], over: Mapping[str, float], baseline: Mapping[str, float]
) -> str:
    """Each exceeded limit (those in `over`) with the value beside its bound, as text for people."""
    texts = []
    for limit in budget.limits:
        if limit.text in over:
            bound = show(limit.metric, limit.resolve(baseline[limit.metric]))
            value = show(limit.metric, values[limit.metric])
            texts.append(f"{limit.metric} {value} against a limit of {bound} ({limit.text})")
    return "; ".join(texts)
