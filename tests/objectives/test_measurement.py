"""Intervals against SciPy, and measurements that survive JSON."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from paretorch.objectives.measurement import Estimate, Measurement


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 50_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_rate_has_the_interval_of_wilson(case):
    hits, n = case
    metric = Estimate.rate(hits, n)
    expected = stats.binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert metric.low == pytest.approx(expected.low, abs=1e-12)
    assert metric.high == pytest.approx(expected.high, abs=1e-12)
    assert metric.value == hits / n
    assert 0 <= metric.low <= metric.value <= metric.high <= 1
    assert metric.n == n


@pytest.mark.parametrize("hits", [0, 20])
def test_a_perfect_rate_is_not_certain(hits):
    metric = Estimate.rate(hits, 20)
    assert metric.high - metric.low > 0.1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=200))
def test_a_mean_has_the_normal_interval(scores):
    scores = np.array(scores)
    metric = Estimate.mean(float(scores.sum()), float((scores**2).sum()), len(scores))
    assert metric.value == pytest.approx(scores.mean(), abs=1e-9)
    half = 1.959963984540054 * scores.std(ddof=1) / math.sqrt(len(scores))
    assert metric.high - metric.value == pytest.approx(half, abs=1e-5)
    assert metric.value - metric.low == pytest.approx(half, abs=1e-5)
    if scores.std() > 1e-3:
        low, high = stats.norm.interval(0.95, scores.mean(), stats.sem(scores))
        assert (metric.low, metric.high) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """A simulated check that does not rest on the formula: 95% of the intervals hold the true rate."""
    draws = np.random.default_rng(0).binomial(500, 0.9, 4000)
    inside = [(m := Estimate.rate(int(hits), 500)).low <= 0.9 <= m.high for hits in draws]
    assert 0.935 <= np.mean(inside) <= 0.965


def test_an_exact_number_has_no_spread():
    assert Estimate.exact(41) == Estimate(41.0, 41.0, 41.0, 0)


def test_a_measurement_survives_json():
    measurement = Measurement(
        {"accuracy": Estimate.rate(9, 10), "size_bytes": Estimate.exact(1234)},
        {"export": 0.25},
        {"torch": "2.8"},
        "short",
    )
    assert Measurement.from_dict(json.loads(json.dumps(measurement.to_dict()))) == measurement
    assert measurement.value("accuracy") == 0.9
    assert measurement.values == {"accuracy": 0.9, "size_bytes": 1234.0}
    assert Measurement.from_dict({"metrics": {}}) == Measurement({})
