"""Do two records of one file agree?"""

import math

import pytest

from paretorch.objectives.measurement import Estimate
from paretorch.runners.record import RecordRow, changed_environment, compare, compare_outputs

BASE = Estimate(4.0, 3.9, 4.1, 50)


def one(then, now):
    (found,) = compare([then], [now])
    return found


@pytest.mark.parametrize(
    ("now", "agrees", "verdict"),
    [
        (Estimate.rate(971, 1000), True, "the same"),
        (Estimate.rate(965, 1000), True, "inside the interval"),
        (Estimate.rate(950, 1000), False, "DIFFERS by -2.10 points"),
        (Estimate.rate(999, 1000), False, "DIFFERS by +2.80 points"),
    ],
)
def test_a_metric_must_lie_inside_the_recorded_interval(now, agrees, verdict):
    found = one(
        RecordRow("accuracy", "test", Estimate.rate(971, 1000), None, ""), RecordRow("accuracy", "test", now, None, "")
    )
    assert (found.agrees, found.verdict, found.name) == (agrees, verdict, "accuracy, test")


@pytest.mark.parametrize(("now", "agrees"), [(1000, True), (1001, False)])
def test_bytes_are_exact(now, agrees):
    found = one(*(RecordRow("size_bytes", "", Estimate.exact(size), None, "") for size in (1000, now)))
    assert found.agrees == agrees
    assert agrees or (found.recorded, found.now) == ("1,000", "1,001"), "told apart although both are 1 kB"


@pytest.mark.parametrize(
    ("ratio", "base", "verdict"),
    [
        (0.50, 4.0, "same speed as recorded"),
        (0.50, 9.0, "same speed as recorded"),  # a machine half as fast
        (0.53, 4.0, "same speed as recorded"),
        (0.70, 4.0, "DIFFERS: slower"),
        (0.35, 4.0, "DIFFERS: faster"),
    ],
)
def test_a_speed_is_the_ratio_to_the_untouched_network(ratio, base, verdict):
    def timed(share, yardstick):
        value = share * yardstick
        return RecordRow(
            "latency_ms",
            "validation",
            Estimate(value, 0.98 * value, 1.02 * value, 50),
            Estimate(yardstick, 0.99 * yardstick, 1.01 * yardstick, 50),
            "",
        )

    found = one(timed(0.5, 4.0), timed(ratio, base))
    assert found.verdict == verdict
    assert found.agrees == verdict.startswith("same")


def test_only_what_both_hold_is_compared():
    row = RecordRow("accuracy", "test", Estimate.rate(1, 2), None, "")
    assert compare([row], []) == []
    assert compare([], [row]) == []


CHECK = {"shape": [2, 2], "outputs": [1.0, -2.0, 0.5, 0.0], "largest": 2.0, "tolerance": 1e-3}


@pytest.mark.parametrize(
    ("outputs", "shape", "agrees"),
    [
        ([1.0, -2.0, 0.5, 0.0], [2, 2], True),
        ([1.0019, -2.0, 0.5, 0.0], [2, 2], True),
        ([1.003, -2.0, 0.5, 0.0], [2, 2], False),
        ([math.nan, -2.0, 0.5, 0.0], [2, 2], False),
        ([1.0, -2.0, 0.5, 0.0], [4], False),
        ([1.0, -2.0], [2, 2], False),
    ],
)
def test_outputs_agree_within_a_tolerance(outputs, shape, agrees):
    assert compare_outputs(CHECK, {"outputs": outputs, "shape": shape}).agrees == agrees


def test_outputs_of_an_older_artifact_are_unknown():
    assert compare_outputs(None, CHECK) is None
    nan = CHECK | {"outputs": [math.nan] * 4}
    assert compare_outputs(nan, nan).agrees


def test_a_changed_environment_is_named():
    then = {"processor": "A", "torch": "2.8", "platform": "x"}
    assert changed_environment(then, {"processor": "B", "torch": "2.8", "platform": "y"}) == [
        "processor: A then, B now"
    ]
