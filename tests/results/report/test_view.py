"""What is said of a front, whoever writes it."""

import doctest
from dataclasses import replace

import pytest

from paretorch.errors import ParetorchError
from paretorch.objectives.measurement import Estimate
from paretorch.results.report import cells
from paretorch.results.report.cells import Cell
from paretorch.results.report.view import view_of


def test_a_number_in_words():
    assert doctest.testmod(cells).failed == 0
    assert Cell.of("size_bytes", Estimate.exact(19_000), "19% of baseline") == Cell("19 kB", "", "", "19% of baseline")
    cell = Cell.of("accuracy", Estimate(0.95, 0.93, 0.97, 100))
    assert (cell.text, cell.spread) == ("95.00% [93.00%, 97.00%]", "±2.00")
    assert Cell.of("accuracy", None).text == "-"


def test_an_empty_front_has_no_knee(fronts):
    """The view must not ask for one."""
    with pytest.raises(ParetorchError):
        fronts["empty"].knee()
    view = view_of(fronts["empty"])
    assert (view.knee, view.recommended, view.members) == (None, None, ())
    assert [near.number for near in view.nearest] == [c.number for c in fronts["empty"].least_violating(3)]


def test_limits_are_told_as_what_they_mean_here(fronts):
    view = view_of(fronts["empty"])
    assert [(limit.text, limit.value) for limit in view.limits] == [
        ("size_bytes <= 2%", 2000.0),
        ("accuracy >= -0.1%", pytest.approx(0.949)),
    ]
    assert view.budget == ("size_bytes <= 2%  (= 2 kB)", "accuracy >= -0.1%  (= 94.90%)")
    assert view_of(fronts["empty"], budget_lines=["my words"]).budget == ("my words",)


def test_what_a_trivial_baseline_is_beside_the_search(fronts):
    verdicts = {trivial.label: trivial.verdict for trivial in view_of(fronts["whole"]).trivial}
    assert verdicts == {
        "FP16": "over size_bytes <= 50%",
        "uniform 8 bit": "on the front: search found nothing better in every objective",
        "uniform 4 bit": "beaten by #6: accuracy +1.50 points (within the intervals), size -20%, latency -12%",
        "pruned 50%": "over size_bytes <= 50%",
    }


def test_a_cluster_is_marked_and_its_cheapest_member_picked(finalists, fronts):
    view = view_of(finalists)
    second = finalists.members[1].number
    marks = [member.marks for member in view.members]
    assert "not what was simulated" in marks[0]
    assert "recommended" in marks[1]
    assert all(f"like #{second}" in mark for mark in marks[2:])
    assert view.pick == "recommended"
    assert view_of(fronts["whole"]).pick == "knee"


def test_a_finalists_latency_is_that_of_the_clean_process(finalists):
    member = view_of(finalists).members[0]
    assert member.numbers["latency_ms"] == Cell("1.25 ms", "[1.2 ms, 1.3 ms]", "±0.05", "1.25x slower")
    assert member.test.beside == "-0.40 ±0.60"


def test_stopped_candidates_are_told_and_count_as_over_no_budget(fronts):
    front = fronts["whole"]
    stopped = replace(front.candidates[1], state="stopped")
    view = view_of(replace(front, candidates=(*front.candidates[:1], stopped, *front.candidates[2:])))
    assert view.outcomes.exceeded == (("size_bytes <= 50%", 4),)
    assert view.outcomes.exceeded_by_over == (("size_bytes <= 50%", 3),)
    assert "1 stopped early as significantly worse." in view.summary
