"""Dominance, hypervolume and knee against slower or other ways to the same answer."""

import math
import time
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretorch.objectives.pareto import hypervolume, knee, nondominated

# A coarse grid, so that ties and equal points are common.
coordinates = st.integers(0, 6).map(lambda v: v / 5)
points = st.integers(1, 4).flatmap(
    lambda d: st.lists(st.lists(coordinates, min_size=d, max_size=d), min_size=1, max_size=9)
)


def beats(one, two):
    return all(a <= b for a, b in zip(one, two, strict=True)) and any(a < b for a, b in zip(one, two, strict=True))


def union(found, reference):
    """The volume of a union of boxes by inclusion and exclusion."""
    total = 0.0
    for size in range(1, len(found) + 1):
        for chosen in combinations(found, size):
            corner = np.max(chosen, axis=0)
            total += (-1) ** (size + 1) * np.prod(np.clip(np.asarray(reference) - corner, 0, None))
    return total


@settings(deadline=None, max_examples=150)
@given(points)
def test_nondominated_is_what_no_other_beats(found):
    expected = [not any(beats(other, point) for other in found) for point in found]
    assert nondominated(found).tolist() == expected


@settings(deadline=None, max_examples=150)
@given(
    st.integers(2, 3).flatmap(
        lambda d: st.lists(
            st.lists(st.sampled_from([-math.inf, 0.0, 1.0, math.inf, math.nan]), min_size=d, max_size=d),
            min_size=1,
            max_size=6,
        )
    )
)
def test_what_is_not_a_number_beats_nothing_and_is_not_beaten(found):
    expected = [not any(beats(other, point) for other in found) for point in found]
    assert nondominated(found).tolist() == expected


@pytest.mark.parametrize("dimension", [2, 3])
def test_nondominated_of_many_points_is_quick(dimension):
    """The sampler asks for the front of all trials at each suggestion."""
    found = np.random.default_rng(0).random((5000, dimension))
    started = time.process_time()
    nondominated(found)
    assert time.process_time() - started < 0.5


def test_nondominated_of_nothing():
    assert nondominated([]).tolist() == []


@settings(deadline=None, max_examples=100)
@given(points)
def test_hypervolume_is_the_union_of_boxes(found):
    reference = [1.0] * len(found[0])
    assert hypervolume(found, reference) == pytest.approx(union(found, reference), abs=1e-9)


@pytest.mark.parametrize("dimension", [2, 3, 4])
def test_hypervolume_is_the_share_of_random_points_that_are_dominated(dimension):
    random = np.random.default_rng(dimension)
    found = random.random((25, dimension))
    samples = random.random((200_000, dimension))
    dominated = np.zeros(len(samples), dtype=bool)
    for point in found:
        dominated |= (samples >= point).all(1)
    assert hypervolume(found, np.ones(dimension)) == pytest.approx(dominated.mean(), abs=5 * 0.5 / 200_000**0.5)


@pytest.mark.parametrize("dimension", [2, 3, 4])
def test_hypervolume_agrees_with_optuna(dimension):
    wfg = pytest.importorskip("optuna._hypervolume")
    random = np.random.default_rng(dimension)
    for count in (1, 5, 40):
        found, reference = random.random((count, dimension)) * 1.2, np.ones(dimension)
        inside = found[(found < reference).all(1)]
        expected = wfg.compute_hypervolume(inside, reference) if len(inside) else 0.0
        assert hypervolume(found, reference) == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, max_examples=50)
@given(points, st.randoms())
def test_hypervolume_does_not_see_order_and_never_falls(found, random):
    reference = [1.0] * len(found[0])
    shuffled = list(found)
    random.shuffle(shuffled)
    assert hypervolume(shuffled, reference) == pytest.approx(hypervolume(found, reference))
    assert hypervolume(found[:-1], reference) <= hypervolume(found, reference) + 1e-12


def test_hypervolume_at_its_edges():
    assert hypervolume([], [1.0, 1.0]) == 0.0
    assert hypervolume([[1.0, 0.0]], [1.0, 1.0]) == 0.0
    assert hypervolume([[2.0, -5.0]], [1.0, 1.0]) == 0.0
    assert hypervolume([[-1.0, -1.0]], [1.0, 1.0]) == 4.0
    assert hypervolume([[0.25], [0.5]], [1.0]) == 0.75
    assert isinstance(hypervolume([[0.5] * 3], [1.0] * 3), float)


def test_hypervolume_of_a_long_front_is_quick():
    """It is computed after each trial, and the engine has 100 ms in all."""
    found = np.random.default_rng(0).dirichlet([1, 1, 1], 100)  # on a plane: no point beats another
    started = time.process_time()
    hypervolume(found, [1.0, 1.0, 1.0])
    assert time.process_time() - started < 0.1


def test_the_knee_is_farthest_below_the_line_through_the_ends():
    angles = np.linspace(0, np.pi / 2, 41)
    front = np.stack([1 - np.cos(angles), 1 - np.sin(angles)], axis=1)
    ends = front[[0, -1]]
    normal = np.array([ends[1, 1] - ends[0, 1], ends[0, 0] - ends[1, 0]])
    distance = np.abs((front - ends[0]) @ normal)
    assert knee(front) == int(distance.argmax()) == 20


@settings(deadline=None, max_examples=50)
@given(points, st.floats(0.1, 100), st.floats(-10, 10))
def test_the_knee_does_not_depend_on_units(found, scale, shift):
    array = np.array(found)
    total = ((array - array.min(0)) / np.where(np.ptp(array, axis=0) > 0, np.ptp(array, axis=0), 1)).sum(1)
    moved = knee(array * scale + shift)
    assert total[moved] == pytest.approx(total.min(), abs=1e-9)


@pytest.mark.parametrize("found", [[[0.3, 0.4]], [[0.3, 0.4], [0.3, 0.4]], [[0.5, 0.1], [0.5, 0.1]]])
def test_the_knee_of_equal_points_is_the_first(found):
    assert knee(found) == 0
