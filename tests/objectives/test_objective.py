"""Objectives, limits and budgets as people write them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretorch.errors import ConfigError
from paretorch.objectives.objective import Budget, Limit, Objective


@pytest.mark.parametrize(
    ("text", "metric", "maximize"),
    [
        ("accuracy", "accuracy", True),
        ("size_bytes", "size_bytes", False),
        ("latency_ms", "latency_ms", False),
        ("macs", "macs", False),
        ("max accuracy", "accuracy", True),
        ("min error", "error", False),
        ("  max   f1 ", "f1", True),
        ("f1", "f1", True),
    ],
)
def test_objective(text, metric, maximize):
    assert Objective.parse(text) == Objective(metric, maximize)


@pytest.mark.parametrize(
    "text", ["", "min", "max", "maximize accuracy", "max accuracy now", "accuracy>=0.9", "min max", "-accuracy"]
)
def test_objective_refused(text):
    with pytest.raises(ConfigError, match="write a metric, or 'min METRIC'"):
        Objective.parse(text)


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(-10, 10).filter(lambda b: abs(b) > 1e-3), st.booleans())
def test_a_loss_orders_as_the_metric_does(one, two, baseline, maximize):
    """For a baseline below zero too: a metric may be a negated error."""
    objective = Objective("f1", maximize)
    if abs(one - two) > 1e-6:
        better = one > two if maximize else one < two
        assert (objective.loss(one, baseline) < objective.loss(two, baseline)) == better


def test_losses_are_shares_of_the_baseline():
    accuracy, size = Objective("accuracy", True), Objective("size_bytes", False)
    assert accuracy.loss(0.8, 0.8) == 0.0
    assert accuracy.loss(0.0, 0.8) == 1.0
    assert accuracy.loss(0.6, 0.8) == pytest.approx(0.25)
    assert size.loss(250, 1000) == 0.25
    assert size.loss(3.0, 0.0) == 3.0
    # With a negative metric the baseline still loses nothing, and twice as bad loses as much as it has.
    assert Objective("negated_error", True).loss(-2.0, -2.0) == 0.0
    assert Objective("negated_error", True).loss(-4.0, -2.0) == 1.0


@pytest.mark.parametrize(
    ("text", "baseline", "bound"),
    [
        ("size_bytes <= 80000", 1e6, 80_000),
        ("size_bytes <= 80_000", 1e6, 80_000),
        ("size_bytes <= 8e4 B", 1e6, 80_000),
        ("size_bytes<=80kB", 1e6, 80_000),
        ("size_bytes <= 1.5 MB", 1e6, 1_500_000),
        ("size_bytes <= 2 GB", 1e6, 2e9),
        ("size_bytes <= 80KiB", 1e6, 81_920),
        ("size_bytes <= 1MiB", 1e6, 1_048_576),
        ("size_bytes <= 1GiB", 1e6, 1_073_741_824),
        ("size_bytes <= 25%", 1e6, 250_000),
        ("size_bytes <= -75%", 1e6, 250_000),
        ("size_bytes <= +10 %", 1e6, 1_100_000),
        ("latency_ms <= 4", 8, 4),
        ("latency_ms <= 4 ms", 8, 4),
        ("latency_ms <= 1500us", 8, 1.5),
        ("latency_ms <= 0.5s", 8, 500),
        ("latency_ms <= 50%", 8, 4),
        ("macs <= 40M", 1e8, 40e6),
        ("macs <= 500K", 1e8, 500e3),
        ("macs <= 1.2 G", 1e8, 1.2e9),
        ("accuracy >= 0.9", 0.95, 0.9),
        ("accuracy >= .9", 0.95, 0.9),
        ("accuracy >= -1%", 0.95, 0.94),
        ("accuracy >= +0.5%", 0.95, 0.955),
        ("psnr >= -3", -2.0, -3),
        ("error <= +2%", 0.1, 0.12),
    ],
)
def test_limit(text, baseline, bound):
    limit = Limit.parse(text)
    assert limit.resolve(baseline) == pytest.approx(bound)
    assert limit.upper == ("<=" in text)
    assert limit.text == text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("accuracy >= 90%", "90% of what"),
        ("accuracy <= 90%", "90% of what"),
        ("f1 >= 90%", "90% of what"),
        ("accuracy >= 90", "between 0 and 1"),
        ("accuracy >= -1", "between 0 and 1"),
        ("val_f1 >= 90", "val_f1 lies between 0 and 1"),
        ("size_bytes <= 80KB", "unknown unit 'KB' for size_bytes; choose from B, kB, MB"),
        ("size_bytes <= 80ms", "unknown unit 'ms'"),
        ("latency_ms <= 4 kB", "choose from us, ms, s, %"),
        ("macs <= 4 kB", "choose from K, M, G, %"),
        ("f1 >= 1kB", "unknown unit 'kB' for f1"),
        ("size_bytes <= 0", "always above zero"),
        ("size_bytes <= 0%", "always above zero"),
        ("size_bytes <= -100%", "always above zero"),
        ("latency_ms <= -150%", "always above zero"),
        ("macs <= -5", "always above zero"),
        ("size_bytes < 25%", "write METRIC <= NUMBER"),
        ("size_bytes = 25%", "write METRIC <= NUMBER"),
        ("size_bytes <=", "write METRIC <= NUMBER"),
        ("<= 25%", "write METRIC <= NUMBER"),
        ("25% >= size_bytes", "write METRIC <= NUMBER"),
        ("size_bytes <= nan", "write METRIC <= NUMBER"),
        ("size_bytes <= ten", "write METRIC <= NUMBER"),
        ("size bytes <= 10", "write METRIC <= NUMBER"),
        ("", "write METRIC <= NUMBER"),
    ],
)
def test_limit_refused(text, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        Limit.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value", "baseline", "excess"),
    [
        ("size_bytes <= 25%", 500.0, 1000.0, 1.0),
        ("size_bytes <= 25%", 250.0, 1000.0, 0.0),
        ("size_bytes <= 25%", 125.0, 1000.0, -0.5),
        ("accuracy >= 0.8", 0.6, 0.9, 0.25),
        ("accuracy >= 0.8", 0.9, 0.9, -0.125),
        ("f1 >= 0", -0.5, 0.9, 0.5),
    ],
)
def test_excess_is_a_share_of_the_limit(text, value, baseline, excess):
    assert Limit.parse(text).excess(value, baseline) == pytest.approx(excess)


def test_an_excess_of_many_values_is_that_of_each():
    for text in ("accuracy >= -1%", "size_bytes <= 25%"):
        limit = Limit.parse(text)
        values = np.array([0.905, 0.9, 0.25 * 0.915, 1.0, math.inf, math.nan])
        expected = [limit.excess(float(value), 0.915) for value in values]
        assert np.array_equal(limit.excess(values, 0.915), expected, equal_nan=True)
        assert 0.0 in expected, "where 0.905 is 1 point less than 0.915"


@pytest.mark.parametrize("images", [200, 1000, 5000])
def test_a_value_at_its_limit_keeps_it(images):
    """One point less than the baseline, counted in images, is no more than one point less in binary either."""
    limit = Limit.parse("accuracy >= -1%")
    point = images // 100
    over = [hits for hits in range(point, images + 1) if limit.excess((hits - point) / images, hits / images) > 0]
    assert not over
    assert all(limit.excess((hits - point - 1) / images, hits / images) > 0 for hits in range(point + 1, images + 1))


def test_a_value_that_is_not_a_number_keeps_no_limit():
    assert not Limit.parse("accuracy >= 0.5").excess(math.nan, 0.9) <= 0


def test_a_budget_gives_all_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        Budget.parse(["size_bytes <= 25%", "accuracy >= 90%", "latency <", "size_bytes <= 80kB", "latency_ms <= 4kB"])
    problems = caught.value.problems
    assert len(problems) == 4
    assert "90% of what" in problems[0]
    assert "'latency <'" in problems[1]
    assert "unknown unit 'kB'" in problems[2]
    assert problems[3] == "limits 'size_bytes <= 25%' and 'size_bytes <= 80kB': keep one of them"


def test_the_two_sides_of_a_metric_may_both_be_limited():
    assert len(Budget.parse(["size_bytes <= 50%", "size_bytes >= 10%"]).limits) == 2


def test_one_limit_may_stand_without_a_list():
    assert Budget.parse("size_bytes <= 25%") == Budget.parse(["size_bytes <= 25%"])
    assert Budget.parse([]) == Budget()


def test_a_budget_judges_what_is_known():
    """Before a recipe is run only its arithmetic is known."""
    budget = Budget.parse(["size_bytes <= 25%", "accuracy >= -1%"])
    baseline = {"size_bytes": 1000.0, "accuracy": 0.9}
    assert budget.excess({"size_bytes": 300.0}, baseline) == {"size_bytes <= 25%": pytest.approx(0.2)}
    both = budget.excess({"size_bytes": 200.0, "accuracy": 0.8}, baseline)
    assert both["size_bytes <= 25%"] < 0 < both["accuracy >= -1%"]


def test_a_budget_says_what_it_means_for_a_baseline():
    budget = Budget.parse(["size_bytes <= 25%", "latency_ms <= 4", "accuracy >= -1%"])
    lines = budget.describe({"size_bytes": 160_000.0, "latency_ms": 8.0, "accuracy": 0.9})
    assert lines == ["size_bytes <= 25%  (= 40 kB)", "latency_ms <= 4", "accuracy >= -1%  (= 89.00%)"]
