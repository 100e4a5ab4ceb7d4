"""What the finalists' numbers say: which points are one, what selection made of them, whose file is another network."""

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paretorch.errors import StudyError
from paretorch.objectives.measurement import Estimate, Measurement
from paretorch.objectives.objective import Budget, Objective
from paretorch.objectives.paired import paired
from paretorch.results import stored
from paretorch.results.candidate import OK, Candidate
from paretorch.results.certainty import describe_clusters, describe_optimism
from paretorch.results.folder import BASELINE, StudyFolder
from paretorch.results.front import Front
from paretorch.results.parity import parity_failure
from paretorch.runners.files.atomic import write_scores
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.quantize import Quantize

N = 400
BASE = Measurement(
    {"accuracy": Estimate.rate(900, 1000), "size_bytes": Estimate.exact(1000), "latency_ms": Estimate(8, 7.9, 8.1, 50)}
)


def right(count, first=0):
    """Scores of N samples of which `count` in a row are right, those from `first` on."""
    scores = np.zeros(N)
    scores[first : first + count] = 1
    return scores


def member(number, size, accuracy=0.9, latency=4.0, **test):
    metrics = {
        "accuracy": Estimate.rate(accuracy * 1000, 1000),
        "size_bytes": Estimate.exact(size),
        "latency_ms": Estimate(latency, 0.99 * latency, 1.01 * latency, 50),
    }
    return Candidate(number, Recipe((Quantize(f"layer{number}", 8),)), OK, measurement=Measurement(metrics), test=test)


def finalists(directory, members, scores, objectives=("accuracy", "size_bytes"), base=None):
    """A front of these members with these scores on the test split."""
    (directory / "finalists").mkdir(exist_ok=True)
    (directory / "candidates").mkdir(exist_ok=True)
    found = []
    for candidate, each in zip(members, scores, strict=True):
        write_scores(directory / "finalists" / f"{candidate.recipe.key}.npy", each)
        found.append(replace(candidate, test={"accuracy": Estimate.of(each), **candidate.test}))
    front = Front(
        tuple(found),
        tuple(map(Objective.parse, objectives)),
        Budget(),
        BASE,
        directory,
        None if base is None else Estimate.of(base),
    )
    if base is not None:
        write_scores(directory / "finalists" / f"{BASELINE}.npy", base)
    return front


def test_a_member_joins_the_cheapest_one_that_is_not_worse(tmp_path):
    sizes = {0: 100, 1: 200, 2: 300, 3: 400, 4: 500}
    members = [member(n, size, 0.8 + n / 50) for n, size in sizes.items()]
    # 1 is like 0; 2 gets 20 more right than 0; 3 is like 2, and like nobody else; 4 is worse than all.
    scores = [right(340), right(343), right(360), right(363), right(300)]
    front = finalists(tmp_path, members, scores)
    assert front.clusters == {0: 0, 1: 0, 2: 2, 3: 2, 4: 0}
    assert describe_clusters(front.clusters, front.quality) == [
        "#0 is recommended over #1, #4: cheaper, and in accuracy not told apart on the test split (paired, 5% "
        "for each pair)",
        "#2 is recommended over #3: cheaper, and in accuracy not told apart on the test split (paired, 5% for "
        "each pair)",
    ]
    assert [front.verdicts(m)["cluster"] for m in front.members] == [0, 0, 2, 2, 0]
    assert front.select("recommended").number == front.clusters[front.knee().number]


def test_the_pairs_decide_and_not_the_intervals(tmp_path):
    """The same two shares: told apart where one gets right all that the other does, not where they err elsewhere."""
    members = [member(0, 100, 0.8), member(1, 200)]
    nested, apart = finalists(tmp_path, members, [right(340), right(350)]), [right(340), right(350, first=50)]
    assert nested.clusters == {0: 0, 1: 1}
    assert finalists(tmp_path, members, apart).clusters == {0: 0, 1: 0}


def test_what_is_faster_has_an_advantage_where_that_is_an_objective(tmp_path):
    slow = member(0, 100, 0.8, latency_ratio=Estimate(0.9, 0.88, 0.92, 40), latency_ms=Estimate(7.2, 7.04, 7.36, 40))
    fast = member(1, 200, 0.9, latency_ratio=Estimate(0.5, 0.48, 0.52, 40), latency_ms=Estimate(4, 3.84, 4.16, 40))
    same = [right(350), right(350)]
    assert finalists(tmp_path, [slow, fast], same).clusters == {0: 0, 1: 0}
    three = ("accuracy", "size_bytes", "latency_ms")
    assert finalists(tmp_path, [slow, fast], same, three).clusters == {0: 0, 1: 1}
    # Where bytes are no objective, the fastest is the cheapest.
    assert finalists(
        tmp_path,
        [replace(slow, measurement=member(0, 100, 0.95, 9.0).measurement), fast],
        same,
        ("accuracy", "latency_ms"),
    ).clusters == {0: 1, 1: 1}


@given(st.lists(st.integers(0, 2**12 - 1), min_size=1, max_size=7))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_recommended_one_is_cheaper_and_nowhere_beyond_doubt_worse(tmp_path, drawn):
    members = [member(n, 100 + n, 0.8 + n / 100) for n in range(len(drawn))]
    scores = [np.repeat([(bits >> i) & 1 for i in range(12)], 4).astype(float) for bits in drawn]
    front = finalists(tmp_path, members, scores)
    assert set(front.clusters) == set(range(len(drawn)))
    heads = sorted(set(front.clusters.values()))
    for number, head in front.clusters.items():
        assert head <= number
        assert front.clusters[head] == head
        assert paired(scores[number], scores[head]).low <= 0
    for first, second in combinations(heads, 2):
        assert paired(scores[second], scores[first]).low > 0, "else they were one cluster"


def test_without_numbers_on_the_test_split_nothing_is_one(tmp_path):
    front = Front(
        (member(0, 100), member(1, 200, 0.95)),
        (Objective("accuracy", True), Objective("size_bytes", False)),
        Budget(),
        BASE,
    )
    assert front.clusters == {}
    assert front.select("recommended") == front.knee()


# --- parity -----------------------------------------------------------------------------------------------------------


def parity(agree=1.0, difference=0.0, half=0.005, simulated=0.9, n=1000):
    return {
        "parity_agreement": Estimate.rate(agree * n, n),
        "parity_metric": Estimate(difference, difference - half, difference + half, n),
        "parity_simulated": Estimate.rate(simulated * n, n),
        "parity_mean_output": Estimate.exact(0.001),
        "parity_max_output": Estimate.exact(0.02),
    }


@pytest.mark.parametrize(
    ("known", "told"),
    [
        ({}, ""),
        (parity(), ""),
        (parity(0.995), ""),
        (parity(0.994), "99.40% of 1000 answers are the simulation's (at least 99.5% are asked)"),
        (parity(0.99, n=400), ""),  # of 400 answers four may be chance
        (parity(0.98, n=400), "98.00% of 400 answers are the simulation's (at least 99.5% are asked)"),
        (parity(difference=0.01), ""),  # beyond chance, but less than the inputs tell of the metric
        (parity(difference=0.03, half=0.04), ""),  # it may be chance
        (parity(difference=-0.03), "its metric is -0.03 [-0.035, -0.025] beside the simulation's 0.9"),
    ],
)
def test_whose_file_is_another_network(known, told):
    assert parity_failure(member(0, 100, **known)) == told


def test_outputs_without_classes_are_held_to_their_size():
    known = parity()
    del known["parity_agreement"]
    assert not parity_failure(member(0, 100, **known))
    known["parity_mean_output"] = Estimate.exact(0.06)
    assert (
        parity_failure(member(0, 100, **known))
        == "its outputs are 6% of the largest off the simulation's on average (at most 5% are allowed)"
    )


def test_it_is_marked_recommended_to_nobody_and_exported_by_force_alone(tmp_path):
    bad, good = member(0, 100, 0.8, **parity(0.9)), member(1, 200, **parity())
    front = finalists(tmp_path, [bad, good], [right(350), right(350)])
    assert front.clusters == {1: 1}
    assert front.recommended().number == 1
    assert front.verdicts(front.members[0])["parity"].startswith("failed: 90.00% of 1000 answers")
    table = front.table().set_index("number")
    assert table.loc[1, "parity"] == "passed"
    assert table.loc[0, "parity"].startswith("failed")
    with pytest.raises(
        StudyError,
        match=r"candidate 0: its file does not compute what was simulated: 90\.00% of 1000 answers .*--force",
    ):
        front.export("0", tmp_path / "deploy")
    with pytest.raises(StudyError, match="was not kept"):  # which is asked after it
        front.export("0", tmp_path / "deploy", force=True)


# --- optimism ---------------------------------------------------------------------------------------------------------


def test_optimism_is_a_difference_of_means_of_pairs(tmp_path):
    rng = np.random.default_rng(0)
    base_val, base_test = (rng.random(n) < 0.9 for n in (300, N))
    vals = [np.where(rng.random(300) < 0.1, rng.random(300) < 0.9, base_val).astype(float) for _ in range(3)]
    tests = [np.where(rng.random(N) < 0.1, rng.random(N) < 0.8, base_test).astype(float) for _ in range(3)]
    members = [member(n, 100 + n, 0.8 + n / 100) for n in range(3)]
    members = [
        replace(m, measurement=Measurement({**m.measurement.metrics, "accuracy": Estimate.of(v)}))
        for m, v in zip(members, sorted(vals, key=np.mean), strict=True)
    ]
    vals = sorted(vals, key=np.mean)
    front = finalists(tmp_path, members, tests, base=base_test.astype(float))
    front = replace(front, baseline=Measurement({**BASE.metrics, "accuracy": Estimate.of(base_val.astype(float))}))
    assert len(front.members) == 3
    found = front.optimism()
    by_hand = np.mean([v - base_val for v in vals], 0), np.mean([t - base_test for t in tests], 0)
    assert found.value == pytest.approx(by_hand[0].mean() - by_hand[1].mean())
    assert found.low == found.high, "no validation scores, no interval"
    for m, v in zip(members, vals, strict=True):
        write_scores(tmp_path / "candidates" / f"{m.recipe.key}.npy", v)
    write_scores(tmp_path / "candidates" / f"{Recipe().key}.npy", base_val.astype(float))
    found = front.optimism()
    error = np.sqrt(by_hand[0].var(ddof=1) / 300 + by_hand[1].var(ddof=1) / N)
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * error)
    assert f"by {100 * found.value:+.2f} ±{100 * 1.959964 * error:.2f} points" in describe_optimism(
        front.optimism(), front.quality
    )


# --- files ------------------------------------------------------------------------------------------------------------


def test_finalists_of_an_older_study_are_read(tmp_path):
    """Before there were clusters an entry held three numbers, the baseline's among them, and no scores beside it."""
    candidate = member(0, 100)
    old = {
        name: vars(metric)
        for name, metric in {
            "accuracy": Estimate.rate(90, 100),
            "latency_ms": Estimate(1, 0.9, 1.1, 10),
            "size_bytes": Estimate.exact(7),
        }.items()
    }
    (tmp_path / "finalists.json").write_text(json.dumps({BASELINE: old, candidate.recipe.key: old}))
    finalists = StudyFolder(tmp_path).read_finalists()
    (found,), base = stored.with_tests([candidate], finalists), stored.tested_baseline(finalists)
    assert base == Estimate.rate(90, 100)
    assert found.test["latency_ms"].value == 1
    front = Front((found,), (Objective("accuracy", True),), Budget(), BASE, tmp_path, base)
    assert front.clusters == {}
    assert front.verdicts(found) == {"speed": "faster"}
    assert front.optimism().value == pytest.approx(0.0)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "finalists.json").write_text('{"baseline": {"accuracy": 3}}')
    with pytest.raises(StudyError, match=r"finalists\.json is damaged .*; delete it"):
        StudyFolder(tmp_path).read_finalists()
