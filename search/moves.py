"""Recipes worth considering: those to begin with, changes of good ones, and the front of the additive model.

Recipes are rows of choice positions, one per axis. `Grid` holds what is known of the axes; the functions propose rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .gaussian import Conditions, Floats, Ints
from .knapsack import front as knapsack_front
from .knapsack import hull

# What can be computed for many recipes, given as choice positions by axis: objectives by position, excesses by limit.
Known = Callable[[Mapping[str, Ints]], tuple[Mapping[int, Floats], Mapping[str, Floats]]]

_MANY = 1000  # choices of all axes from which on the additive front's convex hull is dense enough, and quicker


@dataclass(frozen=True)
class Grid:
    """The axes of the search space, and what can be computed of its recipes.

    Attributes:
        names: The names of the axes.
        counts: The number of choices by axis.
        signs: By objective 1, or -1 where it is maximized.
        known: Computes objectives and excesses, in the objectives' own units.
        conditions: Which axes are conditional.
        ladder: The position of the rung axis.
    """

    names: Sequence[str]
    counts: Ints
    signs: Floats
    known: Known | None = None
    conditions: Conditions | None = None
    ladder: int | None = None

    def computed(self, picks: Ints) -> tuple[Mapping[int, Floats], Mapping[str, Floats]]:
        """What can be computed of recipes: losses by position of the objective, and excesses by limit."""
        if self.known is None:
            return {}, {}
        objectives, excesses = self.known(dict(zip(self.names, picks.T, strict=True)))
        return {position: self.signs[position] * value for position, value in objectives.items()}, excesses

    def canonical(self, rows: Ints) -> Ints:
        """The rows as they are compared: the rung axis at its last choice, inactive axes at their first."""
        if self.ladder is not None:
            rows = rows.copy()
            rows[:, self.ladder] = self.counts[self.ladder] - 1
        return rows if self.conditions is None else np.where(self.conditions.active(rows), rows, 0)

    def randomize_inactive(self, rows: Ints, random: np.random.Generator) -> Ints:
        """The rows with random choices at inactive axes; a change of network then leads to any recipe of the other."""
        if self.conditions is None:
            return rows
        return np.where(self.conditions.active(rows), rows, random.integers(0, self.counts, rows.shape))

    def cost_directions(self) -> Ints:
        """By axis 1 when its last choice costs more than its first, -1 when less, 0 when the computed costs are equal.

        All 1 when nothing can be computed.
        """
        if self.known is None:
            return np.ones(len(self.counts), dtype=np.int64)
        rows = np.repeat((self.counts // 2)[None], 2 * len(self.counts), axis=0)
        for axis, count in enumerate(self.counts):
            if self.conditions is not None and self.conditions.parents[axis] >= 0:
                rows[2 * axis : 2 * axis + 2, self.conditions.parents[axis]] = self.conditions.choices[axis]
            rows[2 * axis, axis], rows[2 * axis + 1, axis] = 0, count - 1
        objectives, excesses = self.computed(rows)
        total = np.zeros(len(self.counts))
        for column in (*objectives.values(), *excesses.values()):
            total += np.sign(column[1::2] - column[::2])
        return np.sign(total).astype(np.int64)

    def choice_costs(self, base: Ints) -> tuple[Ints, list[Floats]]:
        """The axes that can be changed in `base`, and by axis the cost of each choice above the cheapest one.

        The cost is the first objective that can be computed; without one there are no such axes. Axes that other axes
        depend on stay as they are, since costs add up only within one network.
        """
        free = np.arange(len(base)) if self.conditions is None else self.conditions.free(base)
        counts = self.counts[free]
        rows = np.repeat(base[None], int(counts.sum()), axis=0)
        starts = np.cumsum(counts) - counts
        for axis, start, count in zip(free, starts, counts, strict=True):
            rows[start : start + count, axis] = np.arange(count)
        objectives, _ = self.computed(rows)
        if not objectives or not len(free):
            return free[:0], []
        cost = next(iter(objectives.values()))
        return free, [cost[s : s + c] - cost[s : s + c].min() for s, c in zip(starts, counts, strict=True)]

    def uniform(self, share: float, directions: Ints, drawn: Ints) -> Ints:
        """The recipe with every axis at a share of the way from its cheapest choice to its most expensive one.

        Axes without a cost direction have their choice in `drawn`.
        """
        row = np.rint(np.where(directions < 0, 1 - share, share) * (self.counts - 1)).astype(np.int64)
        return np.where(directions == 0, drawn, row)

    def balanced(self, share: float, directions: Ints, drawn: Ints) -> Ints:
        """The best recipe at a share of the way from the lowest cost to the highest, if all axes were alike.

        An axis is assumed to lose accuracy with the square root of its cost, and most at its cheapest choices, as bits
        do (the squared error of n bits falls with 2^-2n). Where no cost can be computed the recipe is `uniform`.
        """
        row = self.uniform(share, directions, drawn)
        free, costs = self.choice_costs(row)
        losses = []
        for axis, cost in zip(free, costs, strict=True):
            falling = np.linspace(1, 0, len(cost))[:: -1 if directions[axis] < 0 else 1]
            losses.append(math.sqrt(np.ptp(cost)) * falling**4)
        front = decoded(losses, costs, free, row)
        if not len(front):
            return row
        cost = next(iter(self.computed(front)[0].values()))
        nearest = np.abs(cost - cost.min() - share * np.ptp(cost)).argmin()
        return np.where(directions == 0, row, front[nearest])


def keys(rows: Ints) -> list[bytes]:
    """The bytes of each row, which find equal rows much faster than np.unique does."""
    whole = np.dtype((np.void, rows.itemsize * rows.shape[1]))
    return list(np.ascontiguousarray(rows).view(whole)[:, 0].tolist())


def decoded(losses: Sequence[Floats], costs: Sequence[Floats], free: Ints, base: Ints) -> Ints:
    """The front of an additive model, by the knapsack.

    Args:
        losses: By free axis, what each of its choices loses.
        costs: By free axis, what each of its choices costs.
        free: The positions of the axes that may change.
        base: The choices of the other axes.
    """
    if not len(free):
        return np.zeros((0, len(base)), dtype=np.int64)
    many = sum(map(len, costs)) >= _MANY
    front = hull(losses, costs, 128) if many else knapsack_front(losses, costs, resolution=64)
    rows = np.repeat(base[None], len(front), axis=0)
    rows[:, free] = np.array([choice.levels for choice in front], dtype=np.int64)
    return rows


def scattered(counts: Ints, random: np.random.Generator, amount: int) -> Ints:
    """Uniformly random rows."""
    return random.integers(0, counts, (amount, len(counts)))


def mutated(rows: Ints, counts: Ints, random: np.random.Generator, amount: int) -> Ints:
    """Random rows with one or two axes changed on average.

    Three times in four by one or two choices, otherwise to any choice.
    """
    chosen = rows[random.integers(len(rows), size=amount)]
    share = random.integers(1, 3, (amount, 1)) / len(counts)
    step = random.integers(1, 3, chosen.shape) * random.choice([-1, 1], chosen.shape)
    moved = np.where(random.random((amount, 1)) < 0.25, random.integers(0, counts, chosen.shape), chosen + step)
    changed = np.where(random.random(chosen.shape) < share, moved, chosen)
    return np.clip(changed, 0, counts - 1)


def crossed(rows: Ints, random: np.random.Generator, amount: int) -> Ints:
    """Uniform crossover of random pairs of rows."""
    left, right = (rows[random.integers(len(rows), size=amount)] for _ in range(2))
    return np.where(random.random(left.shape) < 0.5, left, right)


def neighbours(rows: Ints, counts: Ints, random: np.random.Generator, most: int) -> Ints:
    """The rows, and the rows that differ from one of them in one axis: all, or `most` at random."""
    total = int(counts.sum())
    which = np.arange(len(rows) * total)
    if len(which) > most:
        which = random.choice(len(which), most, replace=False)
    row, place = np.divmod(which, total)
    ends = np.cumsum(counts)
    axis = np.searchsorted(ends, place, side="right")
    changed = rows[row]
    changed[np.arange(len(which)), axis] = place - (ends - counts)[axis]
    return np.concatenate([rows, changed])
