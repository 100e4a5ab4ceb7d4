"""The paired test: the numbers of a t test, how often it errs, and when it holds its tongue."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from paretorch.objectives.paired import FIRST, SURE, difference


@given(st.integers(2, 400), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_the_difference_is_that_of_a_paired_t_test(n, seed):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(0.2, 1, n), rng.normal(0, 1, n + 7)
    found = difference(first, second)
    assert found.n == n
    assert found.value == pytest.approx((first - second[:n]).mean())
    statistic = stats.ttest_rel(first, second[:n]).statistic
    by_hand = found.value / found.error * np.sqrt((n - 1) / n)
    if found.error > np.abs(first - second[:n]).max() / n:  # else the floor counts
        assert by_hand == pytest.approx(statistic)


def test_equal_networks_are_hardly_ever_told_apart():
    """The promise of SURE: six looks at twelve rivals that are as good, and a wrong end in at most 1 of 400 cases."""
    rng, wrong, cases = np.random.default_rng(0), 0, 2000
    for _ in range(cases):
        candidate = rng.random(8192) < 0.9
        rival = np.where(rng.random(8192) < 0.1, rng.random(8192) < 0.9, candidate)
        wrong += any(difference(rival[:n], candidate[:n]).surely_above() for n in (256, 512, 1024, 2048, 4096, 8192))
    assert wrong * 12 / cases <= 1 / 400 * 12  # a rival each; twelve of them are at most twelve times as many


def test_what_is_much_worse_is_found_at_the_first_look_and_not_before():
    worse, better = np.zeros(FIRST), np.r_[np.ones(FIRST // 4), np.zeros(FIRST * 3 // 4)]
    assert difference(better, worse).surely_above()
    assert not difference(better, worse).surely_above(0.2)
    assert not difference(better[: FIRST - 1], worse).surely_above()


def test_agreement_so_far_is_no_certainty():
    same = np.ones(FIRST)
    assert difference(same, same).error == 0
    one = same.copy()
    one[0] = 0
    assert difference(same, one).error >= 1 / FIRST
    assert not difference(same, one).surely_above()
    assert not difference(same[:0], one).surely_above()
    few = same.copy()
    few[: int(SURE**2) - 2] = 0  # fewer one-sided differences than the square of the bar never suffice
    assert not difference(same, few).surely_above()
