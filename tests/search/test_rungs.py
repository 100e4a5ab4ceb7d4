"""Rungs: who climbs, in which order, and what a correlation changes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretorch.objectives.pareto import hypervolume, nondominated
from paretorch.search.rungs import PILOT, Ladder, RungEntry, ranked

points = st.lists(st.tuples(*[st.integers(0, 9)] * 2) | st.tuples(*[st.integers(0, 9)] * 2), min_size=1, max_size=25)


@given(points, st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_no_better_rank_comes_after_a_worse_one(rows, count):
    found = ranked(rows, count)
    assert len(found) == len(set(found)) == min(count, len(rows))
    rank, left, level = {}, list(range(len(rows))), 0
    while left:
        kept = [i for i, keep in zip(left, nondominated([rows[i] for i in left]), strict=True) if keep]
        rank.update(dict.fromkeys(kept, level))
        left, level = [i for i in left if i not in kept], level + 1
    assert [rank[i] for i in found] == sorted(rank.values())[: len(found)]


def test_within_a_rank_the_order_is_by_what_the_hypervolume_would_lose():
    rows = np.array([[0.0, 1.0], [0.1, 0.6], [0.15, 0.55], [0.5, 0.2], [1.0, 0.0]])
    reference = rows.max(0) + 0.1
    lost = [hypervolume(rows, reference) - hypervolume(np.delete(rows, i, 0), reference) for i in range(5)]
    assert ranked(rows, 5) == np.argsort(lost)[::-1].tolist()
    assert ranked(rows, 2) == ranked(rows, 5)[:2]
    assert ranked([], 3) == ranked(rows, 0) == []


def ladder_of(count, rungs=2, **change):
    """A ladder with `count` at its foot, each better than the one before, all equally costly."""
    ladder = Ladder(("untrained", "1 epoch", "1 + 2 epochs")[:rungs])
    for number in range(count):
        ladder.rungs[0].append(RungEntry(number, number / 100, (1 - number / 100, 0.5), **change))
    return ladder


def climb(ladder, upper=lambda standing: standing.metric):
    """Let everybody climb who would, giving new numbers; who did, in order."""
    climbed, new = [], itertools.count(1000)
    while (found := ladder.next_promotion()) is not None:
        number, rung = found
        standing = next(s for s in ladder.rungs[rung] if s.number == number)
        ladder.above[number] = above = next(new)
        ladder.rungs[rung + 1].append(RungEntry(above, upper(standing), standing.losses))
        climbed.append((number, rung))
    return climbed


def test_the_pilots_climb_to_the_top_and_then_the_best_third():
    assert ladder_of(0).next_promotion() is None
    climbed = climb(ladder_of(30))
    assert climbed[:PILOT] == [(number, 0) for number in range(PILOT)]
    assert [number for number, _ in climbed[PILOT:]] == list(range(29, 19 + PILOT, -1)), "room for 10, pilots included"
    three = climb(ladder_of(60, rungs=3))
    assert [rung for _, rung in three[: 2 * PILOT]] == [0, 1] * PILOT, "a pilot goes to the top at once"
    assert sum(rung == 0 for _, rung in three) == 20
    assert sum(rung == 1 for _, rung in three) == 20 // 3


def test_who_may_not_climb_does_not():
    assert ladder_of(30, eligible=False).next_promotion() is None
    ladder = ladder_of(30)
    assert ladder.next_promotion(lambda rung: rung == 0) is None, "no time for training"


@pytest.mark.parametrize(("order", "share"), [(1, 3), (-1, 1)], ids=["foretold", "reversed"])
def test_where_a_rung_foretells_little_more_climb(order, share):
    ladder = ladder_of(60)
    climbed = climb(ladder, lambda standing: order * standing.metric)
    assert ladder.tau(0) == pytest.approx(order)
    assert len(climbed) == 60 // share


def test_the_correlation_is_of_those_on_both_rungs_and_of_enough_of_them():
    from scipy.stats import kendalltau

    rng = np.random.default_rng(0)
    below, above = rng.normal(size=12), rng.normal(size=12)
    ladder = Ladder(("untrained", "1 epoch"))
    for number, (low, high) in enumerate(zip(below, above, strict=True)):
        ladder.rungs[0].append(RungEntry(number, low, (-low,)))
        ladder.rungs[0].append(RungEntry(100 + number, -low, (low,)))  # never climbs
        if number == 5:
            assert ladder.tau(0) is None, "five pairs are none"
        ladder.above[number] = 1000 + number
        ladder.rungs[1].append(RungEntry(1000 + number, high, (-high,)))
    ladder.above[100] = 2000
    ladder.rungs[1].append(RungEntry(2000, float("nan"), eligible=False))  # it failed up there
    assert ladder.tau(0) == pytest.approx(kendalltau(below, above).statistic)
    assert ladder.describe().endswith(f"; Kendall's tau untrained -> 1 epoch {ladder.tau(0):.2f}")


def test_the_shares_are_of_all_that_is_carried_out():
    assert Ladder(("untrained", "1 epoch", "1 + 2 epochs")).shares() == pytest.approx([9 / 13, 3 / 13, 1 / 13])
    assert Ladder(("candidates",)).shares() == [1]
