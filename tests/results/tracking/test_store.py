"""Stores: their URIs, how they are created, and what is said of those that cannot be used."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest

from paretorch.errors import StudyError
from paretorch.results.candidate import Candidate
from paretorch.results.tracking.store import local_store, store_uri
from paretorch.results.tracking.tracker import Tracker
from paretorch.spaces.recipe import Recipe

pytest.importorskip("mlflow")
event = pytest.importorskip("sqlalchemy.event")


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
    tracker = Tracker("digits", directory)
    tracker.start({}, {}, {})
    engine = tracker.store.client._tracking_client.store.engine
    engine.dispose()

    @event.listens_for(engine, "connect")
    def fill(connection: sqlite3.Connection, _: object) -> None:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + 1}")

    with pytest.raises(StudyError, match="the disk is full; free some space"):
        tracker.log(Candidate(0, Recipe(), "failed", "why"), 0.0, False, {f"p{i}": "x" * 5000 for i in range(50)})


def test_passwords_stay_out_of_files_and_messages(tmp_path: Path) -> None:
    with pytest.raises(StudyError) as error:
        Tracker("digits", tmp_path, uri="http://me:secret@127.0.0.1:9")
    assert "secret" not in str(error.value)
