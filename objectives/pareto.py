"""Pareto dominance, hypervolume and knee. All functions take losses (smaller is better), one point per row."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def nondominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Which rows no other row dominates (`<=` everywhere and `<` somewhere).

    Equal rows do not dominate each other, and a row with NaN is never dominated.

    >>> nondominated([[1, 3], [2, 2], [3, 3]]).tolist()
    [True, True, False]
    """
    p = np.asarray(points, dtype=float)
    kept = np.ones(len(p), dtype=bool)
    if not len(p):
        return kept
    order = np.lexsort(p.T)  # by the last column, then by the one before: a row comes after all rows that dominate it
    if p.shape[1] == 2:
        first, second = p[order].T
        start = np.searchsorted(second, second)  # the first, and best, row with the same second column
        least = np.fmin.accumulate(first)
        beaten = (first > first[start]) | ((start > 0) & (first >= least[start - 1]))
        kept[order] = ~beaten | np.isnan(second)
        return kept
    front, count = np.empty_like(p), 0
    for row in order:
        known = front[:count]
        kept[row] = not ((known <= p[row]).all(1) & (known < p[row]).any(1)).any()
        if kept[row]:
            front[count] = p[row]
            count += 1
    return kept


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """The volume that the points dominate below the reference, by slicing along the last axis (any dimension).

    >>> hypervolume([[0.0, 0.5], [0.5, 0.0]], [1.0, 1.0])
    0.75
    """
    ref = np.asarray(reference, dtype=float)
    p = np.asarray(points, dtype=float).reshape(-1, len(ref))
    p = p[(p < ref).all(1)]
    if not len(p):
        return 0.0
    p = np.unique(p[nondominated(p)], axis=0)
    if len(ref) == 1:
        return float(ref[0] - p.min())
    if len(ref) == 2:  # sorted by the first axis, the second one decreases: a staircase
        return float(np.diff(p[:, 0], append=ref[0]) @ (ref[1] - p[:, 1]))
    p = p[np.argsort(p[:, -1], kind="stable")]
    heights = np.diff(p[:, -1], append=ref[-1])
    return sum(float(h) * hypervolume(p[: i + 1, :-1], ref[:-1]) for i, h in enumerate(heights) if h > 0)


def knee(points: ArrayLike) -> int:
    """The index of the row farthest below the plane through the extremes, with every axis scaled to [0, 1] (Das 1999).

    >>> knee([[0.0, 1.0], [0.1, 0.1], [1.0, 0.0]])
    1
    """
    p = np.asarray(points, dtype=float)
    span = np.ptp(p, axis=0)
    return int(np.argmin(((p - p.min(0)) / np.where(span > 0, span, 1.0)).sum(1)))
