"""The knapsack against trying every choice, against the integer programme, and against a published programme."""

import doctest
import json
import os
from functools import cache
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paretorch
from paretorch.search import knapsack
from paretorch.search.knapsack import best, expand, fit_latency, front, hull, tie

DATA = Path(os.environ.get("PARETORCH_DATA") or Path(paretorch.__file__).parents[1] / "shared" / "data")
PUBLISHED = [f"{cost}_{fraction}" for cost in ("modelsize", "bops", "latency") for fraction in (0.75, 0.5, 0.25)]


@cache
def hawq():
    path = DATA / "hawq_resnet18_ilp.json"
    if not path.exists():
        pytest.skip(f"hawq_resnet18_ilp.json is not in {DATA}; set PARETORCH_DATA to the folder that holds it")
    return json.loads(path.read_text())


SMALL, COSTS = st.integers(-6, 6), st.integers(0, 6)


def tables(*, kinds=2, most_items=5, most_levels=4, losses=SMALL, costs=COSTS):
    """One table of losses and others of costs. Small whole numbers: ties and equal sums are common, sums are exact."""

    def filled(sizes):
        return st.tuples(
            *(
                st.tuples(*(st.lists(numbers, min_size=size, max_size=size) for size in sizes))
                for numbers in [losses] + [costs] * (kinds - 1)
            )
        )

    return st.lists(st.integers(1, 4), min_size=1, max_size=most_items).flatmap(filled)


def total(table, levels):
    return sum(row[level] for row, level in zip(table, levels, strict=True))


def every(table):
    return product(*(range(len(row)) for row in table))


def unbeaten(points):
    """The points that no other beats, each once, the cheapest first; by comparing all pairs."""
    points = set(points)
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] <= p[1]}
    return sorted(points - beaten, key=lambda point: point[1])


def random_tables(items, levels, seed=0):
    """Layers of very different sizes and sensitivities, whose loss falls with cost, more or less."""
    random = np.random.default_rng(seed)
    share = random.uniform(0.03, 1, (items, levels))
    losses = np.exp(-5 * share + random.normal(0, 0.3, share.shape)) * random.lognormal(0, 1.5, (items, 1))
    return losses, share * random.lognormal(0, 1.2, (items, 1))


def test_the_examples_in_docstrings_hold():
    assert doctest.testmod(knapsack) == (0, 7)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("solver", ["front", "best"])
def test_the_published_assignments_of_hawq_come_out(name, solver):
    data = hawq()
    kind, fraction = name.rsplit("_", 1)
    low, high = data["cost"][kind]["4"], data["cost"][kind]["8"]
    limit = sum(low) + float(fraction) * (sum(high) - sum(low))
    error = data["squared_weight_error"]
    losses = tie(np.array(data["hessian_trace"])[:, None] * np.column_stack([error["4"], error["8"]]), data["tied"])
    costs = tie(np.column_stack([low, high]), data["tied"])
    if solver == "best":
        levels = best(losses, [costs], [limit])
    else:
        levels = [choice for choice in front(losses, costs) if choice.cost <= limit][-1].levels
    assert len(losses) == 16
    assert [(4, 8)[level] for level in expand(levels, data["tied"])] == data["published_bits"][name]


@settings(deadline=None, max_examples=100)
@given(tables())
def test_the_front_is_what_no_other_choice_beats(given_tables):
    losses, costs = given_tables
    found = front(losses, costs)
    expected = unbeaten((total(losses, levels), total(costs, levels)) for levels in every(losses))
    assert [(choice.loss, choice.cost) for choice in found] == expected
    assert [(total(losses, c.levels), total(costs, c.levels)) for c in found] == expected


@settings(deadline=None, max_examples=100)
@given(tables(losses=st.floats(-1, 1), costs=st.floats(0, 1)))
def test_the_front_of_real_numbers(given_tables):
    """Up to roundings: what is found is real, falls strictly, and nothing is better by more than a rounding."""
    losses, costs = given_tables
    found = front(losses, costs)
    for choice in found:
        assert choice.loss == pytest.approx(total(losses, choice.levels), abs=1e-12)
        assert choice.cost == pytest.approx(total(costs, choice.levels), abs=1e-12)
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in pairwise(found))
    for levels in every(losses):
        limit, loss = total(costs, levels) + 1e-12, total(losses, levels) + 1e-12
        assert any(choice.cost <= limit and choice.loss <= loss for choice in found)


def error(costs, resolution):
    """The bound in the docstring of `front`."""
    spread = sum(max(row) - min(row) for row in costs)
    return 3.5 * len(costs) ** 0.5 * spread / resolution + 1e-9


def check_bucketed(losses, costs, resolution, exact):
    """`exact` holds `(loss, cost)` of choices, of which none may be much better than all of the front."""
    found = front(losses, costs, resolution)
    assert len(found) <= 2 * resolution or len(losses) == 1
    for choice in found:
        assert choice.loss == pytest.approx(total(losses, choice.levels), abs=1e-9)
        assert choice.cost == pytest.approx(total(costs, choice.levels), abs=1e-9)
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in pairwise(found))
    assert found[0].cost == pytest.approx(sum(min(row) for row in costs), abs=1e-9)
    assert found[-1].loss == pytest.approx(sum(min(row) for row in losses), abs=1e-9)
    for loss, cost in exact:
        within = [choice.loss for choice in found if choice.cost <= cost + error(costs, resolution)]
        assert min(within) <= loss + 1e-9
    return found


@settings(deadline=None, max_examples=100)
@given(tables(most_items=5, costs=st.integers(0, 40)), st.integers(1, 40))
def test_buckets_lose_no_more_than_they_say(given_tables, resolution):
    losses, costs = given_tables
    exact = unbeaten((total(losses, levels), total(costs, levels)) for levels in every(losses))
    found = check_bucketed(losses, costs, resolution, exact)
    assert found[0].loss == exact[0][0], "the best of the cheapest"
    assert found[-1].cost == exact[-1][1], "the cheapest of the best"
    if np.prod([len(row) for row in losses]) <= resolution / 2**1.5:
        assert [(choice.loss, choice.cost) for choice in found] == exact, "there was a bucket for every sum"
    if 1 + sum(len(row) - 1 for row in losses) <= resolution:
        for weights in [(10, 1), (2, 1), (1, 1), (1, 2), (1, 10)]:
            least = min(np.dot(weights, point) for point in exact)
            assert least in [np.dot(weights, (choice.loss, choice.cost)) for choice in found], (
                "a corner of the hull is missing"
            )


@settings(deadline=None, max_examples=100)
@given(tables(most_items=5, costs=st.integers(0, 40)), st.integers(1, 40))
def test_the_hull_is_what_is_least_for_some_price(given_tables, most):
    losses, costs = given_tables
    exact = {(choice.loss, choice.cost) for choice in front(losses, costs)}
    prices = [(10, 1), (2, 1), (1, 1), (1, 2), (1, 10)]
    every_corner = [(choice.loss, choice.cost) for choice in hull(losses, costs, 100)]
    assert set(every_corner) <= exact
    assert all(min(np.dot(p, point) for point in exact) in [np.dot(p, c) for c in every_corner] for p in prices)
    steeps = [(c[0] - b[0]) / (c[1] - b[1]) for b, c in pairwise(every_corner)]
    assert all(a <= b + 1e-12 for a, b in pairwise(steeps)), "the hull is convex"
    some = hull(losses, costs, most)
    assert len(some) <= most
    for choice in some:
        assert (choice.loss, choice.cost) in every_corner
        assert (choice.loss, choice.cost) == (total(losses, choice.levels), total(costs, choice.levels))


@pytest.mark.parametrize("resolution", [16, 128])
def test_buckets_lose_little_of_many_items(resolution):
    """The best that the integer programme finds within a limit, and what the buckets kept of it."""
    losses, costs = random_tables(24, 12)
    low, high = costs.min(1).sum(), costs.max(1).sum()
    limits = [low + share * (high - low) for share in (0.05, 0.15, 0.3, 0.6)]
    optimal = [total(losses, best(losses, [costs], [limit])) for limit in limits]
    found = check_bucketed(losses, costs, resolution, zip(optimal, limits, strict=True))
    kept = [min(choice.loss for choice in found if choice.cost <= limit) for limit in limits]
    assert (np.array(kept) >= np.array(optimal) - 1e-9).all()
    assert np.mean(np.array(kept) / optimal) < {16: 1.2, 128: 1.05}[resolution], "it is closer than its bound"


def test_buckets_are_the_same_in_blocks():
    losses, costs = random_tables(8, 9)
    assert front(losses, costs, 32, block=4) == front(losses, costs, 32)


def test_many_items_of_whole_costs():
    """Front and integer programme, both exact, agree; a lazy solver would stop at the first choice that is nearly
    best.
    """
    random = np.random.default_rng(1)
    costs = random.integers(0, 12, (30, 8))
    losses = -costs * random.integers(90, 110, (30, 1)) + random.integers(0, 40, costs.shape)
    exact = front(losses, costs)
    assert len(exact) > 200
    for limit in (40, 90, 160, 230):
        levels = best(losses, [costs], [limit])
        assert total(costs, levels) <= limit
        assert total(losses, levels) == [choice.loss for choice in exact if choice.cost <= limit][-1]


def powers(bits):
    """Costs 0 or 1, 0 or 2, 0 or 4 ...: the sums are all whole numbers, each of one choice, and a loss is minus a
    cost.
    """
    return [[0, -(2**bit)] for bit in range(bits)], [[0, 2**bit] for bit in range(bits)]


@pytest.mark.parametrize("resolution", [None, 2000])
def test_every_sum_stays_that_nothing_beats(resolution):
    assert [choice.cost for choice in front(*powers(10), resolution)] == list(range(1024))


def test_costs_that_hardly_differ():
    """The slopes between them are infinite."""
    losses, costs = [[3, 2, 0], [2, 0, 1]], [[0, 5e-324, 1e-323], [0, 5e-324, 1]]
    assert front(losses, costs, 10) == front(losses, costs)
    assert front(losses, costs, 2)[-1].loss == 0


def test_no_bucket_is_empty():
    found = [choice.cost for choice in front(*powers(16), 64)]
    assert max(np.diff(found)) < 2 * 2**16 / 64


@settings(deadline=None, max_examples=100)
@given(tables(kinds=3), st.tuples(st.none() | st.integers(0, 20), st.none() | st.integers(0, 20)))
def test_the_best_within_two_limits(given_tables, limits):
    losses, *costs = given_tables

    def keeps(levels):
        return all(limit is None or total(table, levels) <= limit for table, limit in zip(costs, limits, strict=True))

    values = [total(losses, levels) for levels in every(losses) if keeps(levels)]
    levels = best(losses, costs, limits)
    assert (levels is None) == (not values)
    if levels is not None:
        assert keeps(levels)
        assert total(losses, levels) == min(values)


def test_the_best_within_limits_that_meet_only_apart():
    """Either limit can be kept, both cannot."""
    losses, first, second = [[0, 1], [0, 1]], [[0, 3], [0, 3]], [[3, 0], [3, 0]]
    assert best(losses, [first, second], [2, None]) == (0, 0)
    assert best(losses, [first, second], [None, 2]) == (1, 1)
    assert best(losses, [first, second], [2, 2]) is None
    assert best(losses, [first, second], [3, 3]) in [(0, 1), (1, 0)]
    assert best(losses, [], []) == (0, 0)
    assert best(losses, [first], [float("inf")]) == (0, 0)
    assert best(losses, [first], [-1]) is None


def test_the_best_in_any_unit():
    """Bytes or seconds, and losses of any size: the solver's tolerances are absolute, ours are not."""
    losses, costs = random_tables(12, 6, seed=3)
    limit = costs.min(1).sum() + 0.3 * np.ptp(costs, axis=1).sum()
    expected = best(losses, [costs], [limit])
    assert expected is not None
    for scale in (1e-9, 1e9):
        assert best(losses, [costs * scale], [limit * scale]) == expected
        assert best(losses * scale, [costs], [limit]) == expected
        assert best(losses * scale - 7, [costs + 5], [limit + 60]) == expected


@pytest.mark.parametrize("below", [1e-7, 1e-9, 1e-11])
def test_a_limit_is_kept_more_sharply_than_the_solver_sees(below):
    """The costs of all choices are nearly the limit: a little below it or a little above it."""
    costs = [[1 + 2 * below, 1 - below, 0]] * 3
    losses = [[0, 1, 50]] * 3
    levels = best(losses, [costs], [3.0])
    assert sorted(levels) == [0, 1, 1]
    assert sorted(best(losses, [costs], [3 - 2 * below])) == [1, 1, 1]


def test_a_limit_just_below_a_sum_of_many_choices():
    """Six dear layers of twelve alike are over the limit, in 924 ways that the solver cannot tell from keeping it."""
    losses = [[0, 10 + item] for item in range(12)]
    levels = best(losses, [[[3.7, 1.3]] * 12], [6 * 3.7 + 6 * 1.3 - 1e-9])
    assert levels == (1,) * 7 + (0,) * 5


def test_a_limit_is_not_missed_by_a_rounding():
    assert 0.1 + 0.2 > 0.3
    assert best([[0, 1], [0, 1]], [[[0.1, 0], [0.2, 0]]], [0.3]) == (0, 0)


def test_a_solver_that_gives_up_is_no_answer():
    losses, costs = random_tables(60, 40)
    with pytest.raises(RuntimeError, match=r"not solved: Time limit reached.*\(status 1\)"):
        best(losses, [costs], [0.5 * costs.max(1).sum()], time_limit=0.0)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_tied_items_take_the_same_level(data):
    """The front of the tied table, expanded, is the front of the choices that are equal within every group."""
    count = data.draw(st.integers(1, 5))
    home = data.draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
    groups = [[item for item in range(count) if home[item] == group] for group in sorted(set(home))]
    named = [data.draw(st.permutations(group)) for group in groups if len(group) > 1 or data.draw(st.booleans())]
    size = {group: data.draw(st.integers(1, 3)) for group in set(home)}
    numbers = st.integers(0, 9)
    losses, costs = (
        [data.draw(st.lists(numbers, min_size=size[group], max_size=size[group])) for group in home] for _ in range(2)
    )
    alike = [levels for levels in every(losses) if all(len({levels[i] for i in group}) == 1 for group in groups)]
    expected = unbeaten((total(losses, levels), total(costs, levels)) for levels in alike)
    found = [(choice, expand(choice.levels, named)) for choice in front(tie(losses, named), tie(costs, named))]
    assert {levels for _, levels in found} <= set(alike)
    assert [(total(losses, levels), total(costs, levels)) for _, levels in found] == expected
    assert [(choice.loss, choice.cost) for choice, _ in found] == expected


def test_nothing_is_tied():
    assert [row.tolist() for row in tie([[1, 2], [3]], [])] == [[1, 2], [3]]
    assert expand((1, 0), []) == (1, 0)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[0, 1], [1, 2]], "item 1 is twice"),
        ([[2, 2]], "item 2 is twice"),
        ([[0, 4]], "item 4 of .*: there are 3 items"),
        ([[-1, 0]], "item -1 of .*: there are 3 items"),
        ([[]], "an empty group"),
    ],
)
def test_groups_that_are_none(groups, message):
    with pytest.raises(ValueError, match=message):
        tie([[1, 2]] * 3, groups)
    with pytest.raises(ValueError, match=message):
        expand((0,) * (3 - sum(len(group) - 1 for group in groups)), groups)


def test_items_of_different_levels_cannot_be_tied():
    with pytest.raises(ValueError, match="items 0 and 2 are tied and have 2 and 3 levels"):
        tie([[1, 2], [1], [1, 2, 3]], [[2, 0]])


@pytest.mark.parametrize(
    ("losses", "costs", "message"),
    [
        ([[1, 2], [3, 4]], [[1, 2], [3]], "item 1: 2 levels in losses and 1 in costs"),
        ([[1, 2], [3, 4]], [[1, 2]], "2 items in losses and 1 in costs"),
        ([[1, 2], []], [[1, 2], []], "item 1: losses must hold one number per level"),
        ([[1, 2], 3], [[1, 2], [3]], "item 1: losses must hold one number per level, not 3"),
        ([[1, 2]], [[[1, 2]]], "item 0: costs must hold one number per level"),
        ([[1, float("nan")]], [[1, 2]], "item 0: a number that is not finite in losses"),
        ([[1, 2], [3, 4]], [[1, 2], [float("inf"), 1]], "item 1: a number that is not finite in costs"),
        ([[1, 2], [3, 4]], [[1, 2], [1, -1]], "item 1: a cost below zero in costs"),
        ([], [], "no items"),
    ],
)
def test_tables_that_are_none(losses, costs, message):
    with pytest.raises(ValueError, match=message):
        front(losses, costs)
    with pytest.raises(ValueError, match=message):
        best(losses, [costs], [5])
    if losses:
        fits = [[0] * max(1, np.size(row)) for row in losses]
        with pytest.raises(
            ValueError, match=message.replace("in costs", r"in costs\[1\]").replace(": costs", ": costs.1.")
        ):
            best(losses, [fits, costs], [5, 5])


def test_limits_and_resolutions_that_are_none():
    with pytest.raises(ValueError, match="2 limits for 1 tables"):
        best([[1]], [[[1]]], [1, 2])
    with pytest.raises(ValueError, match="a limit is a number"):
        best([[1]], [[[1]]], [float("nan")])
    with pytest.raises(ValueError, match="resolution = 0: at least 1"):
        front([[1]], [[1]], 0)


def test_a_latency_table_is_fitted_as_by_least_squares():
    random = np.random.default_rng(0)
    table = [random.random(size) for size in (2, 3, 5, 4)]
    picks = np.column_stack([random.integers(0, len(row), 9) for row in table])
    sums = [total(table, levels) for levels in picks]
    measured = 0.7 + 0.4 * np.array(sums) + random.normal(0, 0.05, 9)
    factor, offset = np.polyfit(sums, measured, 1)
    assert fit_latency(table, picks, measured) == pytest.approx((offset, factor))


def test_a_latency_that_falls_with_the_table_is_constant():
    assert fit_latency([[1, 2, 3]], [[0], [1], [2]], [5.0, 3.0, 1.0]) == (3.0, 0.0)


@pytest.mark.parametrize("picks", [[[0, 1]], [[0, 1]] * 3, [[0, 1], [1, 0]]])
def test_equal_sums_fit_an_offset_alone(picks):
    table = [[0.1, 0.3], [0.2, 0.4]]
    measured = [2.0, 2.2, 2.4][: len(picks)]
    assert fit_latency(table, picks, measured) == pytest.approx((np.mean(measured) - 0.5, 1.0))


@pytest.mark.parametrize(
    ("picks", "measured", "message"),
    [
        ([], [], "do not fit"),
        ([[0, 0]], [1.0, 2.0], "do not fit"),
        ([[0]], [1.0], "do not fit"),
        ([[0, 0]], [float("nan")], "do not fit"),
        ([[0, 2]], [1.0], r"item 1: the picks \[2\] are not all of its 2 levels"),
        ([[0, 0], [-1, 0]], [1.0, 2.0], r"item 0: the picks \[0, -1\]"),
    ],
)
def test_measurements_that_are_none(picks, measured, message):
    with pytest.raises(ValueError, match=message):
        fit_latency([[1, 2], [3, 4]], picks, measured)
