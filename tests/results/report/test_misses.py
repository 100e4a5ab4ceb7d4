"""The limit that a candidate would keep."""

import doctest

import pytest

from paretorch.objectives.objective import Limit
from paretorch.results.report import misses
from paretorch.results.report.misses import needed


@pytest.mark.parametrize(
    "text",
    [
        "size_bytes <= 25%",
        "size_bytes <= -75%",
        "size_bytes <= 10kB",
        "size_bytes <= 3MB",
        "latency_ms <= 0.2",
        "accuracy >= -1%",
        "accuracy >= 0.99",
        "macs <= 1M",
        "loss <= 0.3",
        "f1 >= +2%",
    ],
)
@pytest.mark.parametrize("value", [1e-7, 0.0312499, 0.93, 1.0, 12.3456, 27_499.5, 1_999_999, 123_456_789.0])
def test_the_limit_that_would_be_kept_is_kept(text, value):
    if text.startswith("accuracy") and value > 1:
        value = value % 1  # it lies between 0 and 1
    baseline = 0.95 if value < 2 else value * 1.7
    written = Limit.parse(needed(Limit.parse(text), value, baseline))
    assert written.excess(value, baseline) <= 0
    assert written.metric == Limit.parse(text).metric


def test_the_examples_hold():
    assert doctest.testmod(misses).failed == 0


def test_only_limits_that_are_exceeded_are_missed(fronts):
    front = fronts["empty"]
    kept = front.candidates[2]  # 27% of the bytes, 0.4 points lost: misses both
    assert [keeps for _, keeps in misses.misses(front, kept)] == ["size_bytes <= 27%", "accuracy >= -0.4%"]
    assert misses.misses(front, front.candidates[1]) == [
        ("51 kB, 2.45e+03% over size_bytes <= 2%", "size_bytes <= 51%")
    ]
