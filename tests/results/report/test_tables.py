"""The numbers of a front for programs."""

import json
from dataclasses import replace

import pandas as pd

from paretorch.objectives.measurement import Estimate
from paretorch.results.candidate import Candidate
from paretorch.results.report.tables import csv_text, json_text, rows
from paretorch.results.report.view import view_of
from paretorch.spaces.recipe import Recipe


def test_speed_inside_the_spread_is_no_gain(fronts):
    front = fronts["untested"]
    old = front.candidates[8].measurement
    metrics = {**old.metrics, "accuracy": Estimate.rate(960, 1000), "latency_ms": Estimate(1.02, 0.99, 1.05, 40)}
    slow = replace(front.candidates[8], measurement=replace(old, metrics=metrics))
    told = {row["number"]: row for row in rows(replace(front, candidates=(front.candidates[5], slow)))}
    assert told[8]["latency_ms against baseline"] == "same speed"
    assert told[5]["latency_ms against baseline"] == "2.22x faster"


def test_the_csv_holds_every_candidate_the_front_first(fronts, tmp_path):
    front = fronts["whole"]
    (tmp_path / "front.csv").write_text(csv_text(front.table()))
    table = pd.read_csv(tmp_path / "front.csv")
    assert len(table) == len(front.candidates)
    assert set(table["number"][: len(front.members)]) == {m.number for m in front.members}
    assert [Recipe.from_dict(json.loads(text)).key for text in table["recipe"]] == [
        front.candidates[n].recipe.key for n in table["number"]
    ]


def test_the_json_gives_the_members_back(front):
    data = json.loads(json_text(view_of(front, name="a study")))
    assert data["name"] == "a study"
    assert [Candidate.from_dict(member) for member in data["members"]] == list(front.members)
    assert data["baseline"] == front.baseline.to_dict()
    assert sum(data["candidates"].values()) == len(front.candidates)


def test_finalists_have_their_verdicts_everywhere(finalists):
    second = finalists.members[1]
    members = json.loads(json_text(view_of(finalists)))["members"]
    assert [m["speed"] for m in members] == ["slower"] * len(members)
    assert [m.get("cluster") for m in members] == [None, *[second.number] * (len(members) - 1)]
    head = csv_text(finalists.table()).splitlines()[0].split(",")
    assert {"speed", "cluster", "parity", "test_accuracy_difference_low", "test_latency_ratio"} <= set(head)
    row = rows(finalists)[1]
    assert (row["cluster"], row["latency_ms against baseline"]) == (second.number, "1.25x slower")
