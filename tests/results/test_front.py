"""The front: who is on it, how one is chosen, and what is told when none can be."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretorch.errors import ConfigError, StudyError
from paretorch.objectives.measurement import Estimate, Measurement
from paretorch.objectives.objective import Budget, Objective
from paretorch.results.candidate import FAILED, OK, OVER_BUDGET, Candidate
from paretorch.results.front import Front
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.quantize import Quantize

OBJECTIVES = (Objective("accuracy", True), Objective("size_bytes", False))
IMAGES = 1000


def measured(accuracy, size, latency=1.0):
    return Measurement(
        {
            "accuracy": Estimate.rate(accuracy * IMAGES, IMAGES),
            "size_bytes": Estimate.exact(size),
            "latency_ms": Estimate(latency, latency * 0.9, latency * 1.1, 50),
        }
    )


BASELINE = measured(0.9, 1000, 8.0)


def candidate(number, accuracy=0.9, size=1000, latency=8.0, state=OK, **more):
    recipe = Recipe((Quantize(f"layer{number}", 8),))
    return Candidate(number, recipe, state, measurement=measured(accuracy, size, latency), **more)


def front(*candidates, objectives=OBJECTIVES, budget=()):
    return Front(tuple(candidates), objectives, Budget.parse(budget), BASELINE)


@pytest.fixture
def study():
    return front(
        candidate(0, 0.90, 1000, 8.0, label="untouched"),
        candidate(1, 0.89, 500, 4.0),
        candidate(2, 0.88, 250, 5.0),
        candidate(3, 0.50, 100, 1.0),
        candidate(4, 0.85, 600, 2.0),  # beaten by 1 and 2
        candidate(5, 0.99, 10, 0.1, state=OVER_BUDGET, reason="latency", excess={"latency_ms <= 4": 0.2}),
        candidate(6, 0.99, 10, 0.1, state=FAILED, reason="diverged"),
        Candidate(7, Recipe(), OVER_BUDGET, "refused by arithmetic", excess={"size_bytes <= 25%": 0.01}),
    )


def numbers(candidates):
    return [c.number for c in candidates]


def test_members_are_the_unbeaten_inside_the_budget_smallest_first(study):
    assert numbers(study.members) == [3, 2, 1, 0]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.sampled_from((OK, OK, FAILED))), max_size=12))
def test_members_by_brute_force(rows):
    found = front(*(candidate(i, a / 10, s * 100, state=state) for i, (a, s, state) in enumerate(rows)))
    ok = {i: row for i, row in enumerate(rows) if row[2] == OK}
    expected = [
        i
        for i, (a, s, _) in ok.items()
        if not any(b >= a and t <= s and ((b, t) != (a, s) or j < i) for j, (b, t, _) in ok.items() if j != i)
    ]
    assert sorted(numbers(found.members)) == expected
    sizes = [c.measurement.value("size_bytes") for c in found.members]
    assert sizes == sorted(sizes)


def test_of_equal_points_the_first_stays():
    assert numbers(front(candidate(4, 0.8, 500), candidate(2, 0.8, 500), candidate(7, 0.9, 900)).members) == [4, 7]


def test_losses_are_relative_to_the_baseline(study):
    assert study.losses(study.candidates[2]) == [pytest.approx(0.02 / 0.9), 0.25]
    with pytest.raises(StudyError, match="candidate 7 was never measured \\(refused by arithmetic\\)"):
        study.losses(study.candidates[7])


@pytest.mark.parametrize(
    ("pick", "number"),
    [
        ("knee", 2),
        (" knee ", 2),
        ("0", 0),
        ("4", 4),  # measured, though not on the front
        ("5", 5),  # measured, though over the budget
        ("accuracy", 0),
        ("size_bytes", 3),
        ("size_bytes <= 250", 2),
        ("size_bytes <= 0.6kB", 1),
        ("size_bytes <= 60%", 1),
        ("accuracy >= 0.88", 0),
        ("accuracy >= -1%", 0),
        ("latency_ms <= 4", 1),  # a metric that is no objective here
        ("latency_ms <= 5 and size_bytes <= 30%", 2),
        ("size_bytes <= 10%", 3),
    ],
)
def test_select(study, pick, number):
    assert study.select(pick).number == number


@pytest.mark.parametrize(
    ("pick", "complaint"),
    [
        ("7", "candidate 7 has no file \\(refused by arithmetic\\); the front has 3, 2, 1, 0"),
        ("99", "there is no candidate 99; the front has 3, 2, 1, 0"),
        ("-1", "write knee, recommended, a candidate's number"),
        ("²", "write knee, recommended, a candidate's number"),
        ("latency_ms", "an objective \\(accuracy, size_bytes\\)"),
        ("accurcy", "did you mean accuracy"),
        ("kne", "did you mean knee"),
        ("", "write knee"),
        ("size_bytes <= 50", "no member of the front keeps it; members: 3, 2, 1, 0"),
        ("accuracy >= 90%", "90% of what"),
        ("f1 >= 0.5 and top5 >= 0.5", "unknown metric 'f1', 'top5'; metrics: accuracy, size_bytes, latency_ms"),
        ("size_bytes <= 30 and size_bytes <= 40", "keep one of them"),
    ],
)
def test_select_refused(study, pick, complaint):
    with pytest.raises(ConfigError, match=complaint):
        study.select(pick)


def test_best_takes_objectives_only(study):
    assert study.best("accuracy").number == 0
    with pytest.raises(ConfigError, match="'latency_ms' is not an objective here; choose from accuracy, size_bytes"):
        study.best("latency_ms")


@pytest.mark.parametrize("pick", ["knee", "accuracy", "size_bytes <= 50%"])
def test_an_empty_front_points_to_the_least_violating(pick):
    empty = front(candidate(0, state=OVER_BUDGET, excess={"size_bytes <= 25%": 3.0}), budget=["size_bytes <= 25%"])
    with pytest.raises(StudyError, match="no candidate kept the budget; see the least-violating"):
        empty.select(pick)
    assert empty.select("0").number == 0
    assert empty.hypervolume() == 0.0
    assert empty.members == ()


def test_least_violating_are_measured_and_closest_first():
    over = {
        number: candidate(number, state=OVER_BUDGET, excess=excess)
        for number, excess in enumerate(
            ({"a": 0.5, "b": -9.0}, {"a": 0.1, "b": 0.1}, {"a": 0.2}, {"a": 0.9}, {"a": -1.0, "b": 0.5})
        )
    }
    refused = Candidate(5, Recipe(), OVER_BUDGET, "refused", excess={"a": 0.01})
    found = front(*over.values(), refused, candidate(6), candidate(7, state=FAILED))
    assert numbers(found.least_violating()) == [1, 2, 0]
    assert numbers(found.least_violating(10)) == [1, 2, 0, 4, 3]
    assert over[0].violation == 0.5, "what is inside one limit does not make up for another"


def test_the_hypervolume_by_hand(study):
    # Losses in accuracy (of 0.9) and size: steps at sizes 0.1, 0.25, 0.5, 1.
    lost = {3: 0.4 / 0.9, 2: 0.02 / 0.9, 1: 0.01 / 0.9}
    expected = (0.25 - 0.1) * (1 - lost[3]) + (0.5 - 0.25) * (1 - lost[2]) + (1 - 0.5) * (1 - lost[1])
    assert study.hypervolume() == pytest.approx(expected)
    assert study.hypervolume(1) == 0.0, "the baseline alone is no cheaper than itself"
    assert study.hypervolume(4) == pytest.approx(expected)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(1, 1500), st.floats(0.1, 12), st.booleans()), max_size=12),
    st.integers(1, 3),
)
def test_the_hypervolume_never_falls_with_trials(rows, count):
    found = front(
        *(candidate(i, a, s, ms, OK if ok else OVER_BUDGET) for i, (a, s, ms, ok) in enumerate(rows)),
        objectives=(*OBJECTIVES, Objective("latency_ms", False))[:count],
    )
    curve = [found.hypervolume(upto) for upto in range(len(rows) + 1)]
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(curve))
    assert curve[0] == 0.0
    assert curve[-1] == pytest.approx(found.hypervolume())


def test_the_table_holds_what_was_measured(study):
    table = study.table()
    assert table["number"].tolist() == list(range(8))
    assert table["front"].tolist() == [True, True, True, True, False, False, False, False]
    assert table["state"].tolist() == [c.state for c in study.candidates]
    for row, c in zip(table.to_dict("records"), study.candidates, strict=True):
        assert Recipe.from_dict(json.loads(row["recipe"])) == c.recipe
        assert row["label"] == c.label
        assert row["reason"] == c.reason
        for name in ("accuracy", "size_bytes", "latency_ms"):
            if c.measurement is None:
                assert math.isnan(row[name])
            else:
                assert row[name] == c.measurement.value(name)
        if c.measurement is not None:
            interval = c.measurement.metrics["accuracy"]
            assert (row["accuracy_low"], row["accuracy_high"]) == (interval.low, interval.high)
    assert "size_bytes_low" not in table, "an exact number has no interval"


def test_the_table_survives_csv_and_keeps_the_test_split(study, tmp_path):
    import pandas as pd

    finalist = candidate(8, 0.87, 240, test={"accuracy": Estimate.rate(860, IMAGES)})
    table = front(*study.candidates, finalist).table()
    table.to_csv(tmp_path / "front.csv", index=False)
    again = pd.read_csv(tmp_path / "front.csv", keep_default_na=True)
    assert again["test_accuracy"].iloc[-1] == 0.86
    assert again["test_accuracy"].isna().sum() == 8
    assert again["recipe"].tolist() == table["recipe"].tolist()
    assert again["accuracy_low"].tolist()[:7] == table["accuracy_low"].tolist()[:7]


def test_a_candidate_survives_json():
    full = candidate(
        3,
        0.8,
        400,
        state=OVER_BUDGET,
        reason="too slow",
        excess={"latency_ms <= 4": 0.5},
        picks={"width": 1},
        label="width 0.5",
        test={"accuracy": Estimate.rate(790, IMAGES)},
    )
    for found in (full, Candidate(4, Recipe(), FAILED, "diverged")):
        assert Candidate.from_dict(json.loads(json.dumps(found.to_dict()))) == found
