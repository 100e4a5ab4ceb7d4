"""The paired test: the numbers of a t test, how often it errs, and when it holds its tongue."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from paretorch.objectives.paired import FIRST, SURE, difference, paired


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


# --- intervals --------------------------------------------------------------------------------------------------------


def coverage(n, more, less):
    """How often the interval holds the truth, exactly: over all counts of samples that only one of the two gets
    right.
    """
    held = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            chance = stats.multinomial.pmf([b, c, n - b - c], n, [more, less, 1 - more - less])
            if chance > 1e-9:
                scores, others = np.repeat([1, 0, 1], [b, c, n - b - c]), np.repeat([0, 1, 1], [b, c, n - b - c])
                found = paired(scores, others)
                held += chance * (found.low <= more - less <= found.high)
    return held


@pytest.mark.parametrize(("more", "less"), [(0.01, 0.01), (0.05, 0.05), (0.1, 0.02), (0.04, 0.0), (0.2, 0.15)])
def test_the_interval_for_pairs_holds_the_truth_in_19_of_20_cases(more, less):
    assert coverage(50, more, less) >= 0.95


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=200))
@settings(max_examples=100, deadline=None)
def test_of_shares_the_interval_rests_on_what_only_one_of_them_gets_right(pairs):
    first, second = np.array(pairs).T
    found, other = paired(first, second), paired(second, first)
    assert found.value == pytest.approx((first - second).mean())
    assert (found.low, found.high) == pytest.approx((-other.high, -other.low))
    assert -1 <= found.low <= found.value <= found.high <= 1
    both = np.r_[first, np.ones(5)], np.r_[second, np.ones(5)]
    if found.low > -1 and found.high < 1:  # an interval that is cut off there may be a little narrower
        wide = paired(*both).high - paired(*both).low
        assert wide <= found.high - found.low + 1e-12, "equal answers tell something, too"


def test_six_against_none_are_told_apart_and_five_are_not():
    """As McNemar's exact test has it: p = 2 / 2^6 and 2 / 2^5."""
    for count, apart in ((5, False), (6, True)):
        better, worse = np.ones(400), np.r_[np.zeros(count), np.ones(400 - count)]
        assert (paired(better, worse).low > 0) == apart


def test_of_other_scores_it_is_the_normal_one():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.2, 1, 500), rng.normal(0, 1, 500)
    found = paired(first, second)
    interval = stats.norm.interval(0.95, (first - second).mean(), stats.sem(first - second))
    assert (found.low, found.high) == pytest.approx(interval)
    assert found.n == 500


def test_scores_of_different_samples_are_no_pairs():
    with pytest.raises(ValueError, match="are no pairs"):
        paired(np.ones(3), np.ones(4))
