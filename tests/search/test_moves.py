"""Candidates: they stay within the grid, change what they say they change, and are compared in one form."""

import numpy as np
import pytest

from paretorch.search.gaussian import Conditions
from paretorch.search.moves import Grid, crossed, decoded, keys, mutated, neighbours, scattered

COUNTS = np.array([2, 4, 3, 5])
NAMES = ["network", "bits", "zeros", "effort"]


def cost(picks):
    return {1: 10.0 * picks["bits"] - picks["zeros"]}, {}


def grid(**more):
    return Grid(NAMES, COUNTS, np.array([1.0, 1.0]), **more)


def test_all_moves_stay_within_the_grid():
    random = np.random.default_rng(0)
    rows = scattered(COUNTS, random, 20)
    moves = [mutated(rows, COUNTS, random, 200), crossed(rows, random, 200), neighbours(rows, COUNTS, random, 99)]
    for moved in (rows, *moves):
        assert (moved >= 0).all()
        assert (moved < COUNTS).all()


def test_a_crossing_has_every_choice_from_one_of_its_parents():
    rows = np.array([[0, 0, 0, 0], [1, 3, 2, 4]])
    children = crossed(rows, np.random.default_rng(0), 100)
    assert ((children == rows[0]) | (children == rows[1])).all()
    assert len(set(keys(children))) > 8, "and not all from one"


def test_all_neighbours_or_some():
    row = np.array([[1, 2, 0, 3]])
    everything = neighbours(row, COUNTS, np.random.default_rng(0), 100)
    assert ((everything != row).sum(1) <= 1).all()
    assert len(set(keys(everything))) == 1 + (COUNTS - 1).sum()
    assert len(neighbours(row, COUNTS, np.random.default_rng(0), 5)) == 1 + 5


def test_equal_rows_have_equal_keys():
    rows = np.array([[0, 1], [1, 0], [0, 1]])
    first, second, third = keys(rows)
    assert first == third != second
    assert first == rows[0].tobytes()


def test_rows_are_compared_at_the_top_rung_and_without_inactive_choices():
    conditions = Conditions.of(NAMES, {"bits": ("network", 0), "zeros": ("network", 1)})
    rows = np.array([[0, 3, 2, 1], [1, 3, 2, 1]])
    conditional = grid(conditions=conditions, ladder=3)
    assert conditional.canonical(rows).tolist() == [[0, 3, 0, 4], [1, 0, 2, 4]]
    assert rows[0].tolist() == [0, 3, 2, 1], "the rows themselves stay"
    drawn = conditional.randomize_inactive(np.repeat(rows[:1], 50, axis=0), np.random.default_rng(0))
    assert (drawn[:, [0, 1, 3]] == rows[0, [0, 1, 3]]).all()
    assert set(drawn[:, 2].tolist()) == {0, 1, 2}


def test_costs_are_those_of_each_choice_and_their_directions():
    known = grid(known=cost)
    assert known.cost_directions().tolist() == [0, 1, -1, 0]
    axes, costs = known.choice_costs(np.array([0, 1, 1, 0]))
    assert axes.tolist() == [0, 1, 2, 3]
    assert [row.tolist() for row in costs] == [[0, 0], [0, 10, 20, 30], [2, 1, 0], [0] * 5]
    assert grid().cost_directions().tolist() == [1, 1, 1, 1], "where nothing is known all go the same way"
    assert not len(grid().choice_costs(np.array([0, 1, 1, 0]))[0])


@pytest.mark.parametrize(("share", "expected"), [(0.0, [1, 0, 2, 3]), (1.0, [1, 3, 0, 3])])
def test_the_ends_are_the_cheapest_and_the_most_expensive_recipe(share, expected):
    known, drawn = grid(known=cost), np.array([1, 9, 9, 3])
    assert known.uniform(share, known.cost_directions(), drawn).tolist() == expected
    assert known.balanced(share, known.cost_directions(), drawn).tolist() == expected


def test_the_decoded_front_leaves_other_axes_alone():
    losses, costs = [np.array([5.0, 1.0]), np.array([3.0, 0.0])], [np.array([0.0, 3.0]), np.array([0.0, 1.0])]
    rows = decoded(losses, costs, np.array([0, 2]), np.array([9, 7, 9]))
    assert rows.tolist() == [[0, 7, 0], [0, 7, 1], [1, 7, 0], [1, 7, 1]]
    assert decoded([], [], np.array([], dtype=int), np.array([9, 7, 9])).shape == (0, 3)
