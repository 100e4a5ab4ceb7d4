"""The SQLite file of a local store."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from paretorch.results.tracking.store import RUN_FILE
from paretorch.results.tracking.tracker import Tracker

mlflow = pytest.importorskip("mlflow")

SEARCH = """
import sys, pathlib
from paretorch.results.candidate import Candidate
from paretorch.results.tracking.tracker import Tracker
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
        subprocess.Popen(
            [sys.executable, "-c", SEARCH, str(tmp_path / name), uri, name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    ended = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert [error for _, error in ended] == ["", ""]
    client = mlflow.MlflowClient(uri)
    shared = client.get_experiment_by_name("shared")
    runs = client.search_runs([shared.experiment_id])
    for (out, _), name in zip(ended, ("one", "two"), strict=True):
        assert json.loads((tmp_path / name / RUN_FILE).read_text())["run_id"] == out.strip()
        assert sum(run.data.tags.get("mlflow.parentRunId") == out.strip() for run in runs) == 12
    assert (tmp_path / "store" / "mlartifacts").is_dir()


def test_a_store_whose_creation_was_killed_is_created_again(tmp_path: Path) -> None:
    """Killed between two of MLflow's migrations, a database has tables that the next attempt cannot create again."""
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        connection.execute("CREATE TABLE jobs (id TEXT)")
        connection.commit()
    (tmp_path / "mlflow.db.lock").write_text("creating")
    tracker = Tracker("study", tmp_path)
    assert tracker.experiment_id
    assert (tmp_path / "mlflow.db.lock").read_text() == ""
    Tracker("study", tmp_path)  # a finished one stays
