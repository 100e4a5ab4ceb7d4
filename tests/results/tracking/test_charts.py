"""The chart page on which a study opens."""

from __future__ import annotations

import json
from pathlib import Path

from paretorch.objectives.measurement import Estimate, Measurement
from paretorch.objectives.objective import Budget, Objective
from paretorch.results.candidate import Candidate
from paretorch.results.front import Front
from paretorch.results.tracking.charts import page, view, view_key
from paretorch.results.tracking.store import save_run
from paretorch.spaces.recipe import Recipe


def measured(hits: int, size: float) -> Measurement:
    return Measurement({"accuracy": Estimate.rate(hits, 200), "size_bytes": Estimate.exact(size)})


def test_the_view_shows_the_metric_over_the_cost_and_the_choices_that_matter() -> None:
    picks = ({"a[0]": 0, "b": 1, "same": 3}, {"a[0]": 1, "b": 0, "same": 3}, {"a[0]": 2, "b": 1, "same": 3})
    candidates = [
        Candidate(number, Recipe(), "ok", "", measured(120 + 20 * number, 300 + number), {}, chosen)
        for number, chosen in enumerate(picks)
    ]
    objectives = tuple(Objective.parse(text) for text in ("accuracy", "size_bytes"))
    front = Front(tuple(candidates), objectives, Budget.parse([]), measured(190, 1000))
    state = json.loads(view(front, "run7"))
    assert state["searchFilter"] == "tags.`paretorch.role` = 'trial' and tags.`mlflow.parentRunId` = 'run7'"
    scatter, parallel = state["compareRunCharts"]
    assert (scatter["xaxis"]["key"], scatter["yaxis"]["key"]) == ("size_bytes", "accuracy")
    assert parallel["selectedParams"] == ["a_0_", "b"], "the strongest first, and none that never changed"
    assert parallel["selectedMetrics"] == ["size_bytes", "accuracy"]


def test_the_page_of_a_study_is_its_view(tmp_path: Path) -> None:
    assert page(tmp_path) == "/#/experiments?workflowType=machine_learning"
    save_run(tmp_path, "http://127.0.0.1:5000", "study", "0123456789abcdef", "3")
    assert page(tmp_path).startswith("/#/experiments/3/runs?")
    assert page(tmp_path).endswith(f"&viewStateShareKey={view_key('0123456789abcdef')}")
