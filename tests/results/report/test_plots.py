"""What the pictures show."""

from dataclasses import replace

import pytest

from paretorch.results.report.plots import linear_ticks, log_ticks, plots_of


def test_the_curve_is_the_fronts_hypervolume(fronts):
    front = fronts["untested"]
    numbers = [c.number for c in front.candidates]
    assert plots_of(front).curve == tuple((n, pytest.approx(front.hypervolume(n + 1))) for n in numbers)


def test_every_measured_candidate_has_its_role(fronts):
    front = fronts["whole"]
    size, latency = plots_of(front).panels
    assert (size.x, latency.x) == ("size_bytes", "latency_ms")
    for panel in (size, latency):
        roles = {point.number: point.role for point in panel.points}
        assert roles == {
            -1: "baseline",
            1: "over_budget",
            4: "over_budget",
            3: "trivial",
            7: "other",
            8: "other",
            **{member.number: "front" for member in front.members},
        }


def test_a_candidate_that_is_lost_for_good_does_not_squeeze_the_rest(fronts):
    (panel,) = plots_of(fronts["no latency"]).panels
    below = [point.number for point in panel.points if not panel.inside(point)]
    assert below == [7], "40% of the images where all others have 88% and more"
    assert panel.window[0] > 0.8


def test_a_share_is_shown_in_per_cent(fronts):
    assert plots_of(fronts["whole"]).panels[0].percent
    assert plots_of(fronts["another metric"]).panels[0].percent, "an F1 score is a share, too"


def test_ticks_are_round_and_few(fronts):
    panel = replace(plots_of(fronts["whole"]).panels[0], span=(9_000.0, 100_000.0))
    assert panel.log
    assert log_ticks(panel) == [10_000, 20_000, 30_000, 50_000, 100_000]
    assert list(linear_ticks(0.44, 1.01)) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
