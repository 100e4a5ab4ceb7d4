"""A study in MLflow, in real SQLite stores."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from paretorch.errors import StudyError
from paretorch.objectives.measurement import Estimate, Measurement
from paretorch.objectives.objective import Budget, Objective
from paretorch.results.candidate import Candidate
from paretorch.results.front import Front
from paretorch.results.report.heatmap import write_sensitivity
from paretorch.results.report.plots import hypervolume_curve
from paretorch.results.report.write import FILES, write_report
from paretorch.results.tracking import charts
from paretorch.results.tracking.store import RUN_FILE, local_store, saved_uri
from paretorch.results.tracking.tracker import Tracker, add_sensitivity
from paretorch.runners.files.atomic import write_scores
from paretorch.runners.sensitivity import KL, Sensitivity, SensitivityRow
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover

pytest.importorskip("mlflow")
BASE = Measurement(
    {
        "accuracy": Estimate.rate(190, 200),
        "size_bytes": Estimate.exact(1000),
        "latency_ms": Estimate(1.0, 0.97, 1.04, 40),
    }
)


def measured(hits: int, size: float, latency: float = 0.5) -> Measurement:
    metrics = {
        "accuracy": Estimate.rate(hits, 200),
        "size_bytes": Estimate.exact(size),
        "latency_ms": Estimate(latency, latency * 0.97, latency * 1.04, 40),
    }
    return Measurement(metrics, {"compress": 0.25, "evaluate": 1.5})


def candidates() -> list[Candidate]:
    def bits(n: int) -> Recipe:
        return Recipe((Quantize("conv", n, 8 if n <= 8 else 32), Quantize("fc", n), Recover("batchnorm")))

    return [
        Candidate(
            0, Recipe(), "over_budget", "over size_bytes <= 50%", BASE, {"size_bytes <= 50%": 1.0}, None, "untouched"
        ),
        Candidate(
            1,
            bits(8),
            "ok",
            "",
            measured(189, 260),
            {"size_bytes <= 50%": -0.48},
            {"conv": 4, "fc": 4},
            "uniform 8 bit",
        ),
        Candidate(2, bits(4), "ok", "", measured(180, 140, 0.4), {"size_bytes <= 50%": -0.72}, {"conv": 2, "fc": 2}),
        Candidate(3, bits(3), "failed", "ExportFailed: " + "x" * 900, None, {}, {"conv": 1, "fc": 1}),
        Candidate(
            4, bits(16), "over_budget", "refused by arithmetic", None, {"size_bytes <= 50%": 0.02}, {"conv": 6, "fc": 6}
        ),
        Candidate(5, bits(2), "ok", "", measured(120, 300), {"size_bytes <= 50%": -0.4}, {"conv": 0, "fc": 0}),
    ]


def front(tried: list[Candidate], directory: Path | None = None) -> Front:
    objectives = tuple(Objective.parse(text) for text in ("accuracy", "size_bytes", "latency_ms"))
    return Front(tuple(tried), objectives, Budget.parse(["size_bytes <= 50%"]), BASE, directory)


def picks(candidate: Candidate) -> dict[str, object]:
    return {f"{name}.bits[w]": f"level {value}" for name, value in (candidate.picks or {}).items()}


def log_all(tracker: Tracker, tried: list[Candidate]) -> None:
    members = {c.number for c in front(tried).members}
    for candidate, volume in zip(tried, hypervolume_curve(front(tried)), strict=True):
        tracker.log(candidate, volume, candidate.number in members, picks(candidate))


def started(directory: Path, **kwargs: str) -> Tracker:
    tracker = Tracker("digits", directory, **kwargs)
    tracker.start(
        {"task": "digits.py:task", "budget[0]": "size_bytes <= 50%"}, {"config.yaml": "trials: 6\n"}, {"torch": "2"}
    )
    return tracker


def children(tracker: Tracker) -> dict[str, Any]:
    runs = tracker._search(f"tags.`mlflow.parentRunId` = '{tracker.run_id}'")
    numbers = [run.data.tags["paretorch.number"] for run in runs]
    assert len(set(numbers)) == len(numbers), "a candidate has two runs"
    return dict(zip(numbers, runs, strict=True))


def artifact(run: Any, name: str) -> Path:
    return Path(run.info.artifact_uri.removeprefix("file://")) / name


def test_a_study_is_one_parent_with_a_child_per_candidate(directory: Path) -> None:
    tracker, tried = started(directory), candidates()
    log_all(tracker, tried)
    parent, runs = tracker.store.client.get_run(tracker.run_id), children(tracker)
    assert sorted(runs) == ["0", "1", "2", "3", "4", "5"]
    assert parent.info.status == "RUNNING"
    assert parent.data.params == {"task": "digits.py:task", "budget_0_": "size_bytes <= 50%"}
    assert parent.data.tags["paretorch.role"] == "search"
    assert parent.data.tags["paretorch.env.torch"] == "2"
    assert artifact(parent, "config.yaml").read_text() == "trials: 6\n"
    assert json.loads(artifact(parent, "environment.json").read_text()) == {"torch": "2"}
    assert artifact(parent, "config.yaml").is_relative_to(directory / "mlartifacts")
    for candidate in tried:
        run = runs[str(candidate.number)]
        tags = run.data.tags
        assert run.info.status == ("FAILED" if candidate.state == "failed" else "FINISHED")
        assert tags["paretorch.state"] == candidate.state
        assert tags.get("paretorch.reason", "") == candidate.reason[:500]
        assert tags["paretorch.recipe_key"] == candidate.recipe.key
        assert Recipe.from_dict(json.loads(artifact(run, "recipe.json").read_text())) == candidate.recipe
        assert run.data.params == {f"{n}.bits_w_": f"level {v}" for n, v in (candidate.picks or {}).items()}
    first = runs["1"]
    assert first.info.run_name == "trial-0001 uniform 8 bit"
    assert first.data.metrics["accuracy"] == 0.945
    assert first.data.metrics["accuracy_low"] < 0.945 < first.data.metrics["accuracy_high"]
    assert "size_bytes_low" not in first.data.metrics
    assert first.data.metrics["seconds.evaluate"] == 1.5
    assert first.data.metrics["excess.size_bytes at most 50 percent"] == -0.48
    assert 1500 < first.info.end_time - first.info.start_time < 2500
    assert (first.data.tags["paretorch.front"], runs["5"].data.tags["paretorch.front"]) == ("true", "false")
    history = tracker.store.client.get_metric_history(tracker.run_id, "hypervolume")
    assert [entry.value for entry in sorted(history, key=lambda e: e.step)] == hypervolume_curve(front(tried))


def test_logging_twice_changes_nothing(directory: Path) -> None:
    tracker, tried = started(directory), candidates()
    log_all(tracker, tried)
    before = {number: run.info.run_id for number, run in children(tracker).items()}
    log_all(tracker, tried)
    again = started(directory)
    assert again.run_id == tracker.run_id
    assert again.sync(tried, hypervolume_curve(front(tried)), picks) == 0
    assert {number: run.info.run_id for number, run in children(again).items()} == before
    assert len(again.store.client.get_metric_history(again.run_id, "hypervolume")) == len(tried)


def test_a_killed_study_is_mended(directory: Path) -> None:
    tracker, tried = started(directory), candidates()
    log_all(tracker, tried[:3])
    client = tracker.store.client

    def child(number: int, key: str) -> str:
        tags = {
            "mlflow.parentRunId": tracker.run_id,
            "paretorch.role": "trial",
            "paretorch.number": str(number),
            "paretorch.recipe_key": key,
            "paretorch.state": "ok",
        }
        return str(client.create_run(tracker.experiment_id, tags=tags).info.run_id)

    half = child(3, tried[3].recipe.key)  # left RUNNING
    parts = []
    for run_id, name in ((half, ".recipe.json.1.part"), (tracker.run_id, "report/.front.csv.1.part")):
        folder = Path(urlsplit(client.get_run(run_id).info.artifact_uri).path)
        parts.append(folder / name)
        parts[-1].parent.mkdir(parents=True, exist_ok=True)
        parts[-1].write_text("ha")
    twin = child(2, tried[2].recipe.key)  # finished, but a duplicate
    client.set_terminated(twin)
    foreign = child(77, "0" * 16)  # of no candidate
    client.set_terminated(foreign)

    resumed = started(directory)
    assert resumed.run_id == tracker.run_id
    # 3 was half written, 4 and 5 are missing, 2 was there twice, 77 belongs to nobody.
    assert resumed.sync(tried, hypervolume_curve(front(tried)), picks) == 5
    runs = children(resumed)
    assert sorted(runs) == ["0", "1", "2", "3", "4", "5"]
    assert half not in {run.info.run_id for run in runs.values()}
    assert not [path for path in parts if path.exists()]
    assert {run.info.status for run in runs.values()} == {"FINISHED", "FAILED"}
    history = resumed.store.client.get_metric_history(resumed.run_id, "hypervolume")
    assert sorted(entry.step for entry in history) == [0, 1, 2, 3, 4, 5]
    resumed.finish(front(tried), directory / "nothing", "text", "KILLED")
    assert not resumed._search("attributes.status = 'RUNNING'")
    every = client.search_runs([resumed.experiment_id], run_view_type=3)  # deleted ones too
    assert "RUNNING" not in {run.info.status for run in every}


def test_finish_tells_what_was_found(directory: Path) -> None:
    tracker, tried = started(directory), candidates()
    log_all(tracker, tried)
    tried[2] = replace(tried[2], test={"accuracy": Estimate.rate(885, 1000)})
    # A better one takes the place of number 1.
    better = Candidate(6, Recipe((Quantize("fc", 5),)), "ok", "", measured(192, 200, 0.3), {}, {"conv": 3, "fc": 3})
    tried.append(better)
    log_all(tracker, tried)
    final = front(tried, directory)
    note = write_report(final, directory / "report", name="digits")
    for _ in range(2):  # a resumed study finishes again, and nothing doubles
        tracker.finish(final, directory / "report", note)
    parent, runs = tracker.store.client.get_run(tracker.run_id), children(tracker)
    assert parent.info.status == "FINISHED"
    assert all(artifact(parent, name).stat().st_size > 0 for name in FILES)
    assert parent.data.tags["mlflow.note.content"].startswith("# digits")
    assert "![" not in parent.data.tags["mlflow.note.content"]
    assert parent.data.metrics["baseline.accuracy"] == 0.95
    assert parent.data.metrics["candidates.failed"] == 1
    assert {n: run.data.tags["paretorch.front"] for n, run in runs.items()} == {
        str(c.number): str(c in final.members).lower() for c in tried
    }
    assert runs["1"].data.tags["paretorch.front"] == "false"
    assert runs["2"].data.metrics["test_accuracy"] == 0.885
    assert len(tracker.store.client.get_metric_history(runs["2"].info.run_id, "test_accuracy")) == 1
    table = json.loads(artifact(parent, "front_table.json").read_text())
    assert [row[table["columns"].index("number")] for row in table["data"]] == [c.number for c in final.members]
    experiment = tracker.store.client.get_experiment(tracker.experiment_id)
    loaded = json.loads(experiment.tags[f"mlflow.sharedViewState.{charts.view_key(tracker.run_id)}"])
    assert [chart["type"] for chart in loaded["compareRunCharts"]] == ["SCATTER", "SCATTER", "PARALLEL"]
    assert tracker.run_id in loaded["searchFilter"]
    assert f"viewStateShareKey={charts.view_key(tracker.run_id)}" in charts.page(directory)


def test_what_is_said_of_members_becomes_tags(directory: Path) -> None:
    """And what is not true any more of one that left the front is taken back."""
    tracker, tried = started(directory), candidates()
    log_all(tracker, tried)
    (directory / "finalists").mkdir()
    best = front(tried, directory).members
    for candidate in best:
        write_scores(directory / "finalists" / f"{candidate.recipe.key}.npy", np.arange(100) % 10 / 10)
        known = {
            "accuracy": Estimate.rate(900, 1000),
            "latency_ratio": Estimate(1.2, 1.1, 1.3, 40),
            "parity_agreement": Estimate.rate(900, 1000),
            "parity_metric": Estimate(0, 0, 0, 100),
            "parity_simulated": Estimate.rate(900, 1000),
        }
        if candidate is not best[0]:
            known["parity_agreement"] = Estimate.rate(1000, 1000)
        tried[candidate.number] = replace(candidate, test=known)
    final = front(tried, directory)
    tracker.finish(final, directory / "report", "")
    tags = {n: run.data.tags for n, run in children(tracker).items()}
    first, second = (tags[str(candidate.number)] for candidate in best[:2])
    assert first["paretorch.speed"] == second["paretorch.speed"] == "slower"
    assert first["paretorch.parity"].startswith("failed: 90.00% of 1000 answers")
    assert (second["paretorch.parity"], second["paretorch.recommended"]) == ("passed", "true")
    assert second["paretorch.cluster"] == str(best[1].number)
    assert "paretorch.cluster" not in first
    assert children(tracker)[str(best[1].number)].data.metrics["test_latency_ratio_low"] == 1.1
    better = Candidate(6, Recipe((Quantize("fc", 5),)), "ok", "", measured(200, 1, 0.01), {}, {"conv": 3, "fc": 3})
    tried.append(better)
    log_all(tracker, tried)
    tracker.finish(front(tried, directory), directory / "report", "")
    left = children(tracker)[str(best[1].number)].data.tags
    assert (left["paretorch.front"], left["paretorch.recommended"], left["paretorch.cluster"]) == ("false",) * 3


def measure(directory: Path, divergence: float = 0.0123456) -> None:
    rows = (
        SensitivityRow("conv", 4, 0.0, divergence, 36),
        SensitivityRow("conv", 3, 0.0, math.inf, 28),
        SensitivityRow("fc", 4, 0.0, 1e-6, 20),
    )
    write_sensitivity(Sensitivity(rows, KL, 64), directory, name="digits")


def shown(tracker: Tracker) -> tuple[dict[str, bytes], list[str]]:
    """What the study's run holds of the sensitivity, and which of its artifacts MLflow knows as tables."""
    run = tracker.store.client.get_run(tracker.run_id)
    files = {path.name: path.read_bytes() for path in artifact(run, "sensitivity").glob("*")}
    tables = json.loads(run.data.tags.get("mlflow.loggedArtifacts", "[]"))
    assert {table["type"] for table in tables} <= {"table"}
    return files, [table["path"] for table in tables]


SENSITIVITY = ["sensitivity.csv", "sensitivity.json", "sensitivity.png", "sensitivity_table.json"]


def test_the_sensitivity_is_shown_from_the_start_and_brought_up_to_date_at_the_end(directory: Path) -> None:
    measure(directory)
    tracker = started(directory)
    files, tables = shown(tracker)
    assert sorted(files) == SENSITIVITY
    assert all(files[name] == (directory / name).read_bytes() for name in SENSITIVITY[:3])
    assert json.loads(files["sensitivity_table.json"]) == {
        "columns": ["layer", "4 bits", "3 bits"],
        "data": [["conv", 0.0123, "inf"], ["fc", 1e-6, "-"]],
    }
    assert tables == ["sensitivity/sensitivity_table.json"]
    measure(directory, 0.5)
    for _ in range(2):  # a resumed study finishes again, and nothing doubles
        tracker.finish(front(candidates()), directory / "report", "note")
    files, tables = shown(tracker)
    assert json.loads(files["sensitivity_table.json"])["data"][0] == ["conv", 0.5, "inf"]
    assert tables == ["sensitivity/sensitivity_table.json", "front_table.json"]


def test_a_study_without_sensitivity_shows_none(directory: Path) -> None:
    tracker = started(directory)
    tracker.finish(front(candidates()), directory / "report", "note")
    assert shown(tracker) == ({}, ["front_table.json"])


def test_a_sensitivity_that_cannot_be_read_is_shown_as_it_is(directory: Path) -> None:
    (directory / "sensitivity.json").write_bytes(b'{"version": \xff')
    files, tables = shown(started(directory))
    assert (list(files), tables) == (["sensitivity.json"], [])


def test_a_sensitivity_that_is_measured_later_joins_the_run(directory: Path) -> None:
    assert not add_sensitivity(directory), "there is no run yet"
    tracker = started(directory)
    tracker.finish(front(candidates()), directory / "report", "note")
    before = tracker.store.client.get_run(tracker.run_id)
    measure(directory)
    for _ in range(2):
        assert add_sensitivity(directory)
    files, tables = shown(tracker)
    assert sorted(files) == SENSITIVITY
    assert tables == ["front_table.json", "sensitivity/sensitivity_table.json"]
    after = tracker.store.client.get_run(tracker.run_id)
    assert after.info.status == "FINISHED"
    assert after.info.end_time == before.info.end_time
    assert len(tracker.store.client.search_experiments()) == 2, "MLflow's own and the study's"


def test_it_joins_the_store_of_the_search_whatever_holds_now(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = started(directory)
    measure(directory)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert add_sensitivity(directory)
    assert sorted(shown(tracker)[0]) == SENSITIVITY


def test_a_run_that_is_not_there_gets_no_sensitivity(directory: Path) -> None:
    tracker = started(directory / "a")
    measure(directory / "a")
    shutil.copytree(directory / "a", directory / "b")
    with pytest.raises(StudyError, match=r"holds no run of the study in .*/b;"):
        add_sensitivity(directory / "b")  # its run says that its artifacts lie in a
    assert not shown(tracker)[0]
    tracker.store.client.delete_run(tracker.run_id)
    with pytest.raises(StudyError, match=r"holds no run of the study in .*/a;"):
        add_sensitivity(directory / "a")
    known = json.loads((directory / "a" / RUN_FILE).read_text())
    (directory / "a" / RUN_FILE).write_text(json.dumps(known | {"run_id": "0" * 32}))
    with pytest.raises(StudyError, match="not found"):
        add_sensitivity(directory / "a")
    (directory / "b" / "mlflow.db").unlink()
    with pytest.raises(StudyError, match="unable to open database file"):
        add_sensitivity(directory / "b")
    assert not (directory / "b" / "mlflow.db").exists(), "a mirror is made by a search alone"


def test_another_study_in_a_removed_folder_gets_a_run_of_its_own(directory: Path) -> None:
    first = started(directory)
    first.store.client.create_run(first.experiment_id, tags={"mlflow.parentRunId": first.run_id})
    (directory / RUN_FILE).unlink()
    second = started(directory)
    assert second.run_id != first.run_id
    assert [run.info.run_id for run in second._search("attributes.status = 'RUNNING'")] == [second.run_id]


def test_the_run_is_found_again_without_its_id(directory: Path) -> None:
    first = started(directory)
    known = json.loads((directory / RUN_FILE).read_text())
    (directory / RUN_FILE).write_text(json.dumps({"study": known["study"]}))
    assert started(directory).run_id == first.run_id


def test_a_deleted_parent_is_replaced(directory: Path) -> None:
    first, tried = started(directory), candidates()
    log_all(first, tried)
    first.store.client.delete_run(first.run_id)
    second = started(directory)
    assert second.run_id != first.run_id
    assert second.sync(tried, hypervolume_curve(front(tried)), picks) == len(tried)


def test_a_moved_study_makes_its_mirror_anew(directory: Path) -> None:
    tried = candidates()
    log_all(started(directory / "a"), tried[:2])
    (directory / "a").rename(directory / "b")
    assert saved_uri(directory / "b") == local_store(directory / "b")[0]
    moved = started(directory / "b")
    assert moved.sync(tried, hypervolume_curve(front(tried)), picks) == len(tried)
    assert artifact(children(moved)["0"], "recipe.json").is_relative_to(directory / "b")


def test_two_hundred_layers_and_awkward_names(directory: Path) -> None:
    recipe = Recipe(tuple(Quantize(f"layer{i}.conv", 4, 8) for i in range(200)))
    tracker = started(directory)
    names = {f"layer{i}.conv [bits]": i for i in range(200)}
    names |= {"a[0]": 1, "a,0,": 2, "/x//y/": 3, "..": 4, "": 5, "x" * 400: 6, "Größe": 7}
    tracker.log(Candidate(0, recipe, "ok", "", measured(150, 300)), 0.1, True, names)
    run = children(tracker)["0"]
    assert len(run.data.params) == 207
    assert Recipe.from_dict(json.loads(artifact(run, "recipe.json").read_text())) == recipe
    tracker.finish(front([]), directory, "```\n" + "x" * 90 + ("\n" + "y" * 90) * 100 + "\n```\n")
    note = tracker.store.client.get_run(tracker.run_id).data.tags["mlflow.note.content"]
    assert 7800 < len(note) <= 8000
    assert note.endswith("y\n```\n\n(The rest is in report.md.)")
