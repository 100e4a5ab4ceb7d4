"""The additive multiple-choice knapsack: one level for every item, with losses and costs that add up.

An item is a layer, or a group of layers that must take the same level; a level is one way to compress it (bits,
sparsity, rank). A *table* holds one row of numbers per item, with one number per level; rows may differ in length.

`front` computes the Pareto front by dynamic programming over nondominated partial sums (Nemhauser & Ullmann 1969): two
parts of the items are joined by adding every sum of one to every sum of the other, and dominated sums are dropped,
since no later addition can make them nondominated again. This gives the whole front in one pass, but with real-valued
costs the number of sums can double with every item.

A search that needs the front at every suggestion therefore bounds it by a `resolution`: the costs of a part are
divided into as many buckets, and each bucket keeps only the sum of the least loss. Sums that are kept are exact; what
may be lost is a sum that shared its bucket with one of no more loss and slightly more cost. The error grows with the
number of times that a sum passes through buckets, so the parts are joined in pairs (six rounds for 60 layers, not 59),
and a part of half the items gets 1/sqrt(2) of the buckets, which makes all rounds take equally long. Where a little
cost saves much loss, even one bucket is wide. There the convex hull of the front is dense, and its points are found by
sorting the steps between levels (Sinha & Zoltners 1979). They are added to what the buckets kept; `hull` returns them
alone.

`best` needs no front: it solves an integer program under any number of limits with HiGHS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

Table = Sequence[ArrayLike]
_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Choice:
    """A level for every item, and the sums of their losses and costs."""

    levels: tuple[int, ...]
    loss: float
    cost: float


class _Part(NamedTuple):
    """The nondominated sums over some of the items, by falling loss and rising cost, with a row of levels for each."""

    losses: _Floats
    costs: _Floats
    levels: NDArray[np.integer]


# So many sums at once fit the processor's cache, and are few enough that no fresh memory pages are needed.
_BLOCK = 1 << 13


def front(losses: Table, costs: Table, resolution: int | None = None, block: int = _BLOCK) -> list[Choice]:
    """The Pareto front of all choices, the cheapest first; of choices with equal sums one.

    Without a `resolution` the front is exact, and for many items whose costs are not small integers too long to
    compute. With a resolution, at most twice so many choices are returned (of a single item all): the best of so many
    buckets of cost, and so many points of the convex hull of the exact front, or all its points if there are fewer.
    Exact then are the sums of each choice, the cheapest choice, the one of the least loss, and those on the hull. For
    every choice of the exact front there is one here of no more loss whose cost is higher by at most
    `3.5 * sqrt(items) / resolution` of the difference between the largest and the smallest possible cost; most are far
    closer. Time grows with the square of the resolution: 60 items of 40 levels take 5 ms at 256 and 8 ms at 512.

    Args:
        losses: By item a loss per level; may be negative.
        costs: By item a cost per level; not negative.
        resolution: The number of buckets of cost, None for the exact front.
        block: How many sums are held in memory at once while buckets are filled; the result does not depend on it.

    Raises:
        ValueError: Tables do not fit together or hold a number that is not finite; the message names the item.

    >>> [(choice.levels, choice.loss, choice.cost) for choice in front([[5, 1], [3, 0]], [[1, 4], [1, 2]])]
    [((0, 0), 8.0, 2.0), ((0, 1), 5.0, 3.0), ((1, 0), 4.0, 5.0), ((1, 1), 1.0, 6.0)]
    """
    rows, (spent,) = _checked(losses, [costs])
    if resolution is not None and resolution < 1:
        raise ValueError(f"resolution = {resolution}: at least 1, or None for the exact front")
    parts = _parts(rows, spent)
    levels = reduce(_join, parts).levels if resolution is None else _bucketed(parts, resolution, block)
    return _choices(rows, spent, levels)


def hull(losses: Table, costs: Table, most: int) -> list[Choice]:
    """Points of the front's convex hull, the cheapest first: all, or at most `most`, evenly spaced along it.

    For many items the hull is dense, and it takes a third of the time of `front` with a resolution.

    Raises:
        ValueError: As `front` does.

    >>> [choice.levels for choice in hull([[5, 1], [3, 0]], [[1, 4], [1, 2]], 10)]
    [(0, 0), (0, 1), (1, 1)]
    """
    rows, (spent,) = _checked(losses, [costs])
    if most < 1:
        raise ValueError(f"most = {most}: at least 1")
    return _choices(rows, spent, _thinned(_hull(_parts(rows, spent)), most))


def _parts(rows: list[_Floats], spent: list[_Floats]) -> list[_Part]:
    """For each item its nondominated levels."""
    small = np.min_scalar_type(max(map(len, rows)))
    parts = []
    for row, cost in zip(rows, spent, strict=True):
        kept = _nondominated(row, cost)
        parts.append(_Part(row[kept], cost[kept], kept[:, None].astype(small)))
    return parts


def _choices(rows: list[_Floats], spent: list[_Floats], levels: NDArray[np.integer]) -> list[Choice]:
    """The nondominated choices among rows of levels."""
    loss, cost = _sums(rows, levels), _sums(spent, levels)
    kept = _nondominated(loss, cost)  # added up in the order of the items, sums may differ by a rounding
    columns = levels[kept].tolist(), loss[kept].tolist(), cost[kept].tolist()
    return [Choice(tuple(row), one, other) for row, one, other in zip(*columns, strict=True)]


def _bucketed(parts: list[_Part], resolution: int, block: int) -> NDArray[np.integer]:
    """The levels of the choices that buckets keep of the front, and of points of its convex hull."""
    corners = _thinned(_hull(parts), resolution)
    for depth in reversed(range((len(parts) - 1).bit_length())):
        buckets = math.ceil(resolution / 2 ** (depth / 2))
        pairs = [_join(one, other, buckets, block) for one, other in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    return np.vstack([parts[0].levels, corners])


def _thinned(levels: NDArray[np.integer], most: int) -> NDArray[np.integer]:
    """All rows, or at most `most` of them at regular distances."""
    return levels[:: 1 + (len(levels) - 1) // most]


def _hull(parts: list[_Part]) -> NDArray[np.integer]:
    """The levels along the front's convex hull: from the cheapest, always the step that saves most loss per cost."""
    slopes, items, places = [], [], []
    for item, part in enumerate(parts):
        loss, cost = part.losses.tolist(), part.costs.tolist()
        corners = [0]
        steep = [-math.inf]  # the slope of the step that ends at each corner
        for place in range(1, len(loss)):
            while (slope := (loss[place] - loss[corners[-1]]) / (cost[place] - cost[corners[-1]])) < steep[-1]:
                corners.pop()
                steep.pop()
            corners.append(place)
            steep.append(slope)
        slopes += steep[1:]
        places += corners[1:]
        items += [item] * (len(corners) - 1)
    order = np.argsort(slopes, kind="stable")
    at = np.zeros((len(order) + 1, len(parts)), dtype=np.intp)
    at[np.arange(len(order)) + 1, np.array(items, dtype=np.intp)[order]] = np.array(places, dtype=np.intp)[order]
    np.maximum.accumulate(at, axis=0, out=at)
    return np.hstack([part.levels[at[:, item]] for item, part in enumerate(parts)])


def _join(one: _Part, other: _Part, buckets: int | None = None, block: int = _BLOCK) -> _Part:
    """The nondominated sums of two parts; with more sums than buckets, those of the best sum in each bucket."""
    count = len(one.losses) * len(other.losses)
    pair = np.arange(count) if buckets is None or count <= buckets else _best_in_buckets(one, other, buckets, block)
    left, right = np.divmod(pair, len(other.losses))
    loss, cost = one.losses[left] + other.losses[right], one.costs[left] + other.costs[right]
    kept = _nondominated(loss, cost)
    levels = np.hstack([one.levels[left[kept]], other.levels[right[kept]]])
    return _Part(loss[kept], cost[kept], levels)


def _best_in_buckets(one: _Part, other: _Part, buckets: int, block: int) -> NDArray[np.intp]:
    """The pairs with the sum of the least loss in each bucket."""
    span = float(np.ptp(one.costs) + np.ptp(other.costs))
    scale = buckets * (1 - 1e-12)  # slightly less, so that the highest sum falls into the last bucket
    mine, theirs = ((part.costs - part.costs[0]) / span * scale for part in (one, other))
    least = np.full(buckets, np.inf)
    blocks = []
    rows = max(1, block // len(theirs))
    for start in range(0, len(mine), rows):
        loss = (one.losses[start : start + rows, None] + other.losses).ravel()
        bucket = (mine[start : start + rows, None] + theirs).astype(np.intp).ravel()
        np.minimum.at(least, bucket, loss)
        best = np.flatnonzero(loss == least.take(bucket))  # so far
        blocks.append((best + start * len(theirs), loss[best], bucket[best]))
    pair, loss, bucket = (np.concatenate(columns) for columns in zip(*blocks, strict=True))
    return np.asarray(pair[loss == least[bucket]])


def _nondominated(loss: _Floats, cost: _Floats) -> NDArray[np.intp]:
    """The positions of the nondominated sums, by rising cost; of equal sums the first."""
    order = np.lexsort((loss, cost))
    loss = loss[order]
    keep = np.ones(len(order), dtype=bool)
    keep[1:] = loss[1:] < np.minimum.accumulate(loss)[:-1]
    return np.asarray(order[keep])


# The solver's tolerances are absolute, 1e-6 for sums and integrality; tables are scaled so that sums differ by this.
_SCALE = 1e4
_CUTS = 10  # choices slightly over a limit that are excluded one by one


def best(
    losses: Table, costs: Sequence[Table], limits: Sequence[float | None], time_limit: float = math.inf
) -> tuple[int, ...] | None:
    """The levels of least loss whose costs keep every limit, or None where no choice does.

    The result is optimal to the solver's tolerance, at worst 1e-6 of the difference between the largest and the
    smallest possible loss; of several such choices it is any one. The solver does not see an excess below 1e-6 of the
    range of the costs either, so what it returns is added up again: the first ten choices with such an excess are
    excluded one by one, and after that also those that keep the limit by as little.

    Args:
        losses: By item a loss per level.
        costs: Tables of costs, which are not negative.
        limits: For each table of costs an upper limit in its unit, or None for no limit. A sum that exceeds its limit
            by a rounding error (1e-12 of it) keeps it.
        time_limit: Seconds that one call of the solver may take.

    Raises:
        ValueError: As `front` does, or limits that do not fit the tables.
        RuntimeError: The solver gives up.

    >>> best([[5, 1], [3, 0]], [[[1, 4], [1, 2]], [[2, 2], [7, 9]]], [5, None])
    (1, 0)
    >>> best([[5, 1], [3, 0]], [[[1, 4], [1, 2]], [[2, 2], [7, 9]]], [5, 8]) is None
    True
    """
    rows, spent = _checked(losses, costs)
    if len(limits) != len(spent):
        raise ValueError(f"{len(limits)} limits for {len(spent)} tables of costs")
    if any(limit is not None and math.isnan(limit) for limit in limits):
        raise ValueError(f"limits = {list(limits)}: a limit is a number, or None for no limit")
    bounded = [(table, limit) for table, limit in zip(spent, limits, strict=True) if limit is not None]
    sizes = [len(row) for row in rows]
    item, level = np.repeat(np.arange(len(rows)), sizes), np.arange(sum(sizes))
    constraints = [LinearConstraint(csr_array((np.ones(len(level)), (item, level))), 1, 1)]
    constraints += [_at_most(table, limit) for table, limit in bounded]
    tries = 0
    while True:
        solution = milp(
            _above_least(rows)[0],
            integrality=np.ones(len(level)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0, "time_limit": time_limit},  # the default gap, 1e-4, would not be optimal
        )
        if solution.status == 2 and tries <= _CUTS:
            return None
        if solution.status != 0:
            near = f", after {tries} choices just over a limit" if tries else ""
            status = f"{solution.message} (status {solution.status})"
            raise RuntimeError(f"the integer programme was not solved{near}: {status}")
        levels = tuple(int(part.argmax()) for part in np.split(solution.x, np.cumsum(sizes)[:-1]))
        sums = [float(_sums(table, np.array([levels]))[0]) for table, _ in bounded]
        over = [pair for pair, total in zip(bounded, sums, strict=True) if total > pair[1] + 1e-12 * abs(pair[1])]
        if not over:
            return levels
        tries += 1
        table, limit = over[0]
        if tries <= _CUTS:  # choices that cost no less for any item are over the limit, too
            expensive = np.concatenate([row >= row[at] for row, at in zip(table, levels, strict=True)])
            constraints.append(LinearConstraint(expensive[None].astype(float), -np.inf, len(rows) - 1))
        else:
            constraints.append(_at_most(table, limit, margin=1e-6 * (tries - _CUTS)))


def _at_most(table: list[_Floats], limit: float, margin: float = 0.0) -> LinearConstraint:
    """The limit of the sum of a table, lowered by a share (`margin`) of the range of its sums."""
    above, scale = _above_least(table)
    room = limit - sum(float(row.min()) for row in table)
    return LinearConstraint(above[None], -np.inf, room * scale - margin * _SCALE)


def _above_least(table: list[_Floats]) -> tuple[_Floats, float]:
    """What each level adds to the smallest sum, scaled for the solver, and the scale."""
    span = sum(float(np.ptp(row)) for row in table)
    scale = _SCALE / span if span > 0 else 1.0
    return np.concatenate([row - row.min() for row in table]) * scale, scale


def tie(table: Table, groups: Sequence[Sequence[int]]) -> list[_Floats]:
    """The table in which each group of items that must take the same level is one item; their rows are added up.

    A group takes the place of its first item; items in no group stay as they are.

    >>> [row.tolist() for row in tie([[1, 2], [3, 4, 5], [10, 20]], [[0, 2]])]
    [[11.0, 22.0], [3.0, 4.0, 5.0]]
    """
    rows = _rows(table, "table")
    homes = _homes(len(rows), groups)
    for group in homes:
        for item in group:
            if len(rows[item]) != len(rows[group[0]]):
                both = f"{len(rows[group[0]])} and {len(rows[item])} levels"
                raise ValueError(f"items {group[0]} and {item} are tied and have {both}")
    return [np.sum([rows[item] for item in group], axis=0) for group in homes]


def expand(levels: Sequence[int], groups: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The levels of all items, from the levels of the items of a table that `tie` returned.

    >>> expand((1, 2), [[0, 2]])
    (1, 2, 1)
    """
    count = len(levels) + sum(len(group) - 1 for group in groups)
    level = {item: at for group, at in zip(_homes(count, groups), levels, strict=True) for item in group}
    return tuple(level[item] for item in range(count))


def _homes(count: int, groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """The groups, with an own one for each item in no group, by their first item."""
    tied = [sorted(group) for group in groups]
    members = [item for group in tied for item in group]
    for item in members:
        if not 0 <= item < count:
            raise ValueError(f"item {item} of {groups}: there are {count} items, from 0")
        if members.count(item) > 1:
            raise ValueError(f"item {item} is twice in {groups}")
    if not all(tied):
        raise ValueError(f"an empty group in {groups}")
    return sorted(tied + [[item] for item in range(count) if item not in members])


def fit_latency(table: Table, picks: Sequence[Sequence[int]], measured: Sequence[float]) -> tuple[float, float]:
    """The `(offset, factor)` with which `offset + factor * sum` fits end-to-end measurements best.

    The sum of single layers misses what the network adds as a whole and what the runtime fuses. Fitted by least
    squares; the factor is not negative, and 1 where all sums are equal.

    Args:
        table: By item a time per level.
        picks: The levels of each measurement.
        measured: The time of each measurement, in the unit of the table.

    >>> fit_latency([[1, 2], [3, 5]], [[0, 0], [1, 1]], [3.0, 4.5])
    (1.0, 0.5)
    """
    rows, times, levels = _rows(table, "table"), np.asarray(measured, dtype=float), np.asarray(picks, dtype=int)
    if not len(times) or not np.isfinite(times).all() or levels.shape != (len(times), len(rows)):
        raise ValueError(f"{len(rows)} items, picks of shape {levels.shape} and measured {list(measured)} do not fit")
    for item, row in enumerate(rows):
        if levels[:, item].min() < 0 or levels[:, item].max() >= len(row):
            raise ValueError(f"item {item}: the picks {levels[:, item].tolist()} are not all of its {len(row)} levels")
    sums = _sums(rows, levels)
    apart = sums - sums.mean()
    distinct = np.ptp(sums) > 1e-9 * np.abs(sums).max()
    factor = max(0.0, float(apart @ times / (apart @ apart))) if distinct else 1.0
    return float(times.mean() - factor * sums.mean()), factor


def _sums(rows: list[_Floats], levels: NDArray[np.integer]) -> _Floats:
    """The sums of a table over the levels of each choice, one choice per row."""
    total = np.zeros(len(levels))
    for row, chosen in zip(rows, levels.T, strict=True):
        total += row[chosen]
    return total


def _checked(losses: Table, costs: Sequence[Table]) -> tuple[list[_Floats], list[list[_Floats]]]:
    """The tables as arrays; raises `ValueError` where they do not fit together."""
    rows = _rows(losses, "losses")
    if not rows:
        raise ValueError("losses: no items")
    spent = []
    for number, table in enumerate(costs):
        name = "costs" if len(costs) == 1 else f"costs[{number}]"
        spent.append(_rows(table, name))
        if len(spent[-1]) != len(rows):
            raise ValueError(f"{len(rows)} items in losses and {len(spent[-1])} in {name}")
        for item, (row, cost) in enumerate(zip(rows, spent[-1], strict=True)):
            if len(row) != len(cost):
                raise ValueError(f"item {item}: {len(row)} levels in losses and {len(cost)} in {name}")
            if cost.min() < 0:
                raise ValueError(f"item {item}: a cost below zero in {name}, {cost.tolist()}")
    return rows, spent


def _rows(table: Table, name: str) -> list[_Floats]:
    """A table as arrays; raises `ValueError` where it is none."""
    rows = [np.asarray(row, dtype=float) for row in table]
    for item, row in enumerate(rows):
        if row.ndim != 1 or not len(row):
            raise ValueError(f"item {item}: {name} must hold one number per level, not {row.tolist()}")
        if not np.isfinite(row).all():
            raise ValueError(f"item {item}: a number that is not finite in {name}, {row.tolist()}")
    return rows
