"""The MLflow mirror, against real SQLite stores."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from paretorch.errors import StudyError
from paretorch.objectives.measurement import Estimate, Measurement
from paretorch.objectives.objective import Budget, Objective
from paretorch.results.candidate import Candidate
from paretorch.results.front import Front
from paretorch.results.report.heatmap import write_sensitivity
from paretorch.results.report.report import FILES, hypervolume_curve, write_report
from paretorch.results.tracking import tracker as tracking
from paretorch.results.tracking.tracker import Tracker, add_sensitivity, local_store, page, saved_uri, store_uri
from paretorch.runners.files.atomic import write_scores
from paretorch.runners.sensitivity import KL, Sensitivity, SensitivityRow
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover

mlflow = pytest.importorskip("mlflow")
event = pytest.importorskip("sqlalchemy.event")
BASE = Measurement(
    {
        "accuracy": Estimate.rate(190, 200),
        "size_bytes": Estimate.exact(1000),
        "latency_ms": Estimate(1.0, 0.97, 1.04, 40),
    }
)


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


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
        Candidate(0, Recipe(), "over_budget", "over size_bytes <= 50%", BASE, {"size_bytes <= 50%": 1.0}, None, "untouched"),
        Candidate(1, bits(8), "ok", "", measured(189, 260), {"size_bytes <= 50%": -0.48}, {"conv": 4, "fc": 4}, "uniform 8 bit"),
        Candidate(2, bits(4), "ok", "", measured(180, 140, 0.4), {"size_bytes <= 50%": -0.72}, {"conv": 2, "fc": 2}),
        Candidate(3, bits(3), "failed", "ExportFailed: " + "x" * 900, None, {}, {"conv": 1, "fc": 1}),
        Candidate(4, bits(16), "over_budget", "refused by arithmetic", None, {"size_bytes <= 50%": 0.02}, {"conv": 6, "fc": 6}),
        Candidate(5, bits(2), "ok", "", measured(120, 300), {"size_bytes <= 50%": -0.4}, {"conv": 0, "fc": 0}),
    ]  # fmt: skip


def front(found: list[Candidate], directory: Path | None = None) -> Front:
    objectives = tuple(Objective.parse(text) for text in ("accuracy", "size_bytes", "latency_ms"))
    return Front(tuple(found), objectives, Budget.parse(["size_bytes <= 50%"]), BASE, directory)


def picks(candidate: Candidate) -> dict[str, object]:
    return {f"{name}.bits[w]": f"level {value}" for name, value in (candidate.picks or {}).items()}


def log_all(tracker: Tracker, found: list[Candidate]) -> None:
    members = {c.number for c in front(found).members}
    for candidate, volume in zip(found, hypervolume_curve(front(found)), strict=True):
        tracker.log(candidate, volume, candidate.number in members, picks(candidate))


def started(directory: Path, **kwargs: str) -> Tracker:
    tracker = Tracker("digits", directory, **kwargs)
    tracker.start(
        {"task": "digits.py:task", "budget[0]": "size_bytes <= 50%"}, {"config.yaml": "trials: 6\n"}, {"torch": "2"}
    )
    return tracker


def children(tracker: Tracker) -> dict[str, object]:
    runs = tracker._search(f"tags.`mlflow.parentRunId` = '{tracker.run_id}'")
    numbers = [run.data.tags["paretorch.number"] for run in runs]
    assert len(set(numbers)) == len(numbers), "a candidate has two runs"
    return dict(zip(numbers, runs, strict=True))


def artifact(run: object, name: str) -> Path:
    return Path(run.info.artifact_uri.removeprefix("file://")) / name  # type: ignore[attr-defined]


def test_a_study_is_one_parent_with_a_child_per_candidate(directory: Path) -> None:
    tracker, found = started(directory), candidates()
    log_all(tracker, found)
    parent, runs = tracker._client.get_run(tracker.run_id), children(tracker)
    assert sorted(runs) == ["0", "1", "2", "3", "4", "5"]
    assert parent.info.status == "RUNNING"
    assert parent.data.params == {"task": "digits.py:task", "budget_0_": "size_bytes <= 50%"}
    assert parent.data.tags["paretorch.role"] == "search"
    assert parent.data.tags["paretorch.env.torch"] == "2"
    assert artifact(parent, "config.yaml").read_text() == "trials: 6\n"
    assert json.loads(artifact(parent, "environment.json").read_text()) == {"torch": "2"}
    assert artifact(parent, "config.yaml").is_relative_to(directory / "mlartifacts")
    for candidate in found:
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
    history = tracker._client.get_metric_history(tracker.run_id, "hypervolume")
    assert [entry.value for entry in sorted(history, key=lambda e: e.step)] == hypervolume_curve(front(found))


def test_logging_twice_changes_nothing(directory: Path) -> None:
    tracker, found = started(directory), candidates()
    log_all(tracker, found)
    before = {number: run.info.run_id for number, run in children(tracker).items()}
    log_all(tracker, found)
    again = started(directory)
    assert again.run_id == tracker.run_id
    assert again.sync(found, hypervolume_curve(front(found)), picks) == 0
    assert {number: run.info.run_id for number, run in children(again).items()} == before
    assert len(again._client.get_metric_history(again.run_id, "hypervolume")) == len(found)


def test_a_killed_study_is_mended(directory: Path) -> None:
    tracker, found = started(directory), candidates()
    log_all(tracker, found[:3])
    client = tracker._client

    def child(number: int, key: str) -> str:
        tags = {"mlflow.parentRunId": tracker.run_id, "paretorch.role": "trial", "paretorch.number": str(number),
                "paretorch.recipe_key": key, "paretorch.state": "ok"}  # fmt: skip
        return str(client.create_run(tracker.experiment_id, tags=tags).info.run_id)

    half = child(3, found[3].recipe.key)  # left RUNNING
    parts = []
    for run_id, name in ((half, ".recipe.json.1.part"), (tracker.run_id, "report/.front.csv.1.part")):
        folder = Path(urlsplit(client.get_run(run_id).info.artifact_uri).path)
        parts.append(folder / name)
        parts[-1].parent.mkdir(parents=True, exist_ok=True)
        parts[-1].write_text("ha")
    twin = child(2, found[2].recipe.key)  # finished, but a duplicate
    client.set_terminated(twin)
    foreign = child(77, "0" * 16)  # of no candidate
    client.set_terminated(foreign)

    resumed = started(directory)
    assert resumed.run_id == tracker.run_id
    # 3 was half written, 4 and 5 are missing, 2 was there twice, 77 belongs to nobody.
    assert resumed.sync(found, hypervolume_curve(front(found)), picks) == 5
    runs = children(resumed)
    assert sorted(runs) == ["0", "1", "2", "3", "4", "5"]
    assert half not in {run.info.run_id for run in runs.values()}
    assert not [path for path in parts if path.exists()]
    assert {run.info.status for run in runs.values()} == {"FINISHED", "FAILED"}
    history = resumed._client.get_metric_history(resumed.run_id, "hypervolume")
    assert sorted(entry.step for entry in history) == [0, 1, 2, 3, 4, 5]
    resumed.finish(front(found), directory / "nothing", "text", "KILLED")
    assert not resumed._search("attributes.status = 'RUNNING'")
    every = client.search_runs([resumed.experiment_id], run_view_type=3)  # deleted ones too
    assert "RUNNING" not in {run.info.status for run in every}


def test_finish_tells_what_was_found(directory: Path) -> None:
    tracker, found = started(directory), candidates()
    log_all(tracker, found)
    found[2] = replace(found[2], test={"accuracy": Estimate.rate(885, 1000)})
    # A better one takes the place of number 1.
    better = Candidate(6, Recipe((Quantize("fc", 5),)), "ok", "", measured(192, 200, 0.3), {}, {"conv": 3, "fc": 3})
    found.append(better)
    log_all(tracker, found)
    final = front(found, directory)
    note = write_report(final, directory / "report", name="digits")
    for _ in range(2):  # a resumed study finishes again, and nothing doubles
        tracker.finish(final, directory / "report", note)
    parent, runs = tracker._client.get_run(tracker.run_id), children(tracker)
    assert parent.info.status == "FINISHED"
    assert all(artifact(parent, name).stat().st_size > 0 for name in FILES)
    assert parent.data.tags["mlflow.note.content"].startswith("# digits")
    assert "![" not in parent.data.tags["mlflow.note.content"]
    assert parent.data.metrics["baseline.accuracy"] == 0.95
    assert parent.data.metrics["candidates.failed"] == 1
    assert {n: run.data.tags["paretorch.front"] for n, run in runs.items()} == {
        str(c.number): str(c in final.members).lower() for c in found
    }
    assert runs["1"].data.tags["paretorch.front"] == "false"
    assert runs["2"].data.metrics["test_accuracy"] == 0.885
    assert len(tracker._client.get_metric_history(runs["2"].info.run_id, "test_accuracy")) == 1
    table = json.loads(artifact(parent, "front_table.json").read_text())
    assert [row[table["columns"].index("number")] for row in table["data"]] == [c.number for c in final.members]
    loaded = json.loads(tracker._client.get_experiment(tracker.experiment_id).tags[f"mlflow.sharedViewState.{tracking._view_key(tracker.run_id)}"])  # fmt: skip
    assert [chart["type"] for chart in loaded["compareRunCharts"]] == ["SCATTER", "SCATTER", "PARALLEL"]
    assert tracker.run_id in loaded["searchFilter"]
    assert f"viewStateShareKey={tracking._view_key(tracker.run_id)}" in page(directory)
    assert str(directory) in tracker.url_hint()


def test_what_is_said_of_members_becomes_tags(directory: Path) -> None:
    """And what is not true any more of one that left the front is taken back."""
    tracker, found = started(directory), candidates()
    log_all(tracker, found)
    (directory / "finalists").mkdir()
    best = front(found, directory).members
    for candidate in best:
        write_scores(directory / "finalists" / f"{candidate.recipe.key}.npy", np.arange(100) % 10 / 10)
        known = {"accuracy": Estimate.rate(900, 1000), "latency_ratio": Estimate(1.2, 1.1, 1.3, 40),
                 "parity_agreement": Estimate.rate(900, 1000), "parity_metric": Estimate(0, 0, 0, 100),
                 "parity_simulated": Estimate.rate(900, 1000)}  # fmt: skip
        if candidate is not best[0]:
            known["parity_agreement"] = Estimate.rate(1000, 1000)
        found[candidate.number] = replace(candidate, test=known)
    final = front(found, directory)
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
    found.append(better)
    log_all(tracker, found)
    tracker.finish(front(found, directory), directory / "report", "")
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
    run = tracker._client.get_run(tracker.run_id)
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
    before = tracker._client.get_run(tracker.run_id)
    measure(directory)
    for _ in range(2):
        assert add_sensitivity(directory)
    files, tables = shown(tracker)
    assert sorted(files) == SENSITIVITY
    assert tables == ["front_table.json", "sensitivity/sensitivity_table.json"]
    after = tracker._client.get_run(tracker.run_id)
    assert after.info.status == "FINISHED"
    assert after.info.end_time == before.info.end_time
    assert len(tracker._client.search_experiments()) == 2, "MLflow's own and the study's"


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
    tracker._client.delete_run(tracker.run_id)
    with pytest.raises(StudyError, match=r"holds no run of the study in .*/a;"):
        add_sensitivity(directory / "a")
    known = json.loads((directory / "a" / tracking.RUN_FILE).read_text())
    (directory / "a" / tracking.RUN_FILE).write_text(json.dumps(known | {"run_id": "0" * 32}))
    with pytest.raises(StudyError, match="not found"):
        add_sensitivity(directory / "a")
    (directory / "b" / "mlflow.db").unlink()
    with pytest.raises(StudyError, match="unable to open database file"):
        add_sensitivity(directory / "b")
    assert not (directory / "b" / "mlflow.db").exists(), "a mirror is made by a search alone"


def test_another_study_in_a_removed_folder_gets_a_run_of_its_own(directory: Path) -> None:
    first = started(directory)
    first._client.create_run(first.experiment_id, tags={"mlflow.parentRunId": first.run_id})
    (directory / tracking.RUN_FILE).unlink()
    second = started(directory)
    assert second.run_id != first.run_id
    assert [run.info.run_id for run in second._search("attributes.status = 'RUNNING'")] == [second.run_id]


def test_the_run_is_found_again_without_its_id(directory: Path) -> None:
    first = started(directory)
    known = json.loads((directory / tracking.RUN_FILE).read_text())
    (directory / tracking.RUN_FILE).write_text(json.dumps({"study": known["study"]}))
    assert started(directory).run_id == first.run_id


def test_a_deleted_parent_is_replaced(directory: Path) -> None:
    first, found = started(directory), candidates()
    log_all(first, found)
    first._client.delete_run(first.run_id)
    second = started(directory)
    assert second.run_id != first.run_id
    assert second.sync(found, hypervolume_curve(front(found)), picks) == len(found)


def test_a_moved_study_makes_its_mirror_anew(directory: Path) -> None:
    found = candidates()
    log_all(started(directory / "a"), found[:2])
    (directory / "a").rename(directory / "b")
    assert saved_uri(directory / "b") == local_store(directory / "b")[0]
    moved = started(directory / "b")
    assert moved.sync(found, hypervolume_curve(front(found)), picks) == len(found)
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
    note = tracker._client.get_run(tracker.run_id).data.tags["mlflow.note.content"]
    assert 7800 < len(note) <= 8000
    assert note.endswith("y\n```\n\n(The rest is in report.md.)")


SEARCH = """
import sys, pathlib, json
sys.path.insert(0, sys.argv[4])
from paretorch.search.tracking import Tracker
from paretorch.search.candidate import Candidate
from paretorch.spaces.recipe import Recipe
tracker = Tracker(sys.argv[3], pathlib.Path(sys.argv[1]), uri=sys.argv[2], experiment="shared")
tracker.start({}, {}, {})
for number in range(12):
    tracker.log(Candidate(number, Recipe(), "failed", "why"), 0.0, False, {f"p{i}": i for i in range(20)})
print(tracker.run_id)
"""


def test_two_searches_start_at_once_on_one_fresh_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}"
    started = [
        subprocess.Popen([sys.executable, "-c", SEARCH, str(tmp_path / name), uri, name, os.getcwd()],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]  # fmt: skip
    ended = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert [error for _, error in ended] == ["", ""]
    client = mlflow.MlflowClient(uri)
    shared = client.get_experiment_by_name("shared")
    runs = client.search_runs([shared.experiment_id])
    for (out, _), name in zip(ended, ("one", "two"), strict=True):
        assert json.loads((tmp_path / name / tracking.RUN_FILE).read_text())["run_id"] == out.strip()
        assert sum(run.data.tags.get("mlflow.parentRunId") == out.strip() for run in runs) == 12
    assert (tmp_path / "store" / "mlartifacts").is_dir()


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert store_uri(tmp_path) == local_store(tmp_path)[0] == f"sqlite:///{tmp_path}/mlflow.db"
    assert store_uri(tmp_path, "sqlite:///some/m.db") == f"sqlite:///{tmp_path}/some/m.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert store_uri(tmp_path) == f"sqlite:///{tmp_path}/other.db"
    assert store_uri(tmp_path, "http://127.0.0.1:5000") == "http://127.0.0.1:5000"


@pytest.mark.parametrize(
    ("uri", "say"),
    [
        ("./mlruns", "no file store"),
        ("file:///tmp/mlruns", "no file store"),
        ("sqlite://", "name a file"),
        ("http://127.0.0.1:9", "no MLflow server answers"),
        ("sqlite:///{tmp}/a_file/mlflow.db", "its folder exists and is writable"),
        ("sqlite:////proc/nowhere/mlflow.db", "its folder exists and is writable"),
        ("sqlite:///{tmp}/a_file", "not a database"),
    ],
)
def test_a_store_that_cannot_be_used_says_so_at_once(tmp_path: Path, uri: str, say: str) -> None:
    (tmp_path / "a_file").write_text("this is no database, and long enough to be sure of it" * 50)
    before = time.monotonic()
    with pytest.raises(StudyError, match=say):
        Tracker("digits", tmp_path / "study", uri=uri.format(tmp=tmp_path))
    assert time.monotonic() - before < 10


def test_a_full_disk_is_named(directory: Path) -> None:
    tracker = started(directory)
    engine = tracker._client._tracking_client.store.engine
    engine.dispose()

    @event.listens_for(engine, "connect")
    def fill(connection: sqlite3.Connection, _: object) -> None:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + 1}")

    with pytest.raises(StudyError, match="the disk is full; free some space"):
        tracker.log(candidates()[1], 0.5, False, {f"p{i}": "x" * 5000 for i in range(50)})


def test_passwords_stay_out_of_files_and_messages(tmp_path: Path) -> None:
    with pytest.raises(StudyError) as error:
        Tracker("digits", tmp_path, uri="http://me:secret@127.0.0.1:9")
    assert "secret" not in str(error.value)


@pytest.mark.slow
def test_the_ui_opens_on_the_study_and_ends_with_ctrl_c(directory: Path) -> None:
    tracker, found = started(directory), candidates()
    log_all(tracker, found)
    tracker.finish(front(found), directory, "note")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = (f"import sys; sys.path.insert(0, {os.getcwd()!r})\nfrom pathlib import Path\n"
                "from paretorch.results.tracking.tracker import serve, local_store, page\n"
                f"d = Path({str(directory)!r})\nsys.exit(serve(*local_store(d), {port}, page(d)))")  # fmt: skip
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            said = [process.stdout.readline() for _ in range(3)]
            assert said[0].startswith(f"Port {port} is taken")
            link = said[2].removeprefix("Open ").strip()
            assert link.endswith(page(directory))
            with urllib.request.urlopen(link.partition("#")[0], timeout=30) as answer:
                assert b"MLflow" in answer.read()
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(link.partition("#")[0], timeout=5)


def test_a_store_whose_making_was_killed_is_made_anew(tmp_path):
    """Killed between two of MLflow's migrations, a database has tables that the next attempt cannot create again."""
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        connection.execute("CREATE TABLE jobs (id TEXT)")
        connection.commit()
    (tmp_path / "mlflow.db.lock").write_text("creating")
    tracker = Tracker("study", tmp_path)
    assert tracker.experiment_id
    assert (tmp_path / "mlflow.db.lock").read_text() == ""
    Tracker("study", tmp_path)  # a finished one stays
