"""An MLflow store: its URI, which run in it belongs to a study, and how runs are written.

Measured on MLflow 3.17:

- `import mlflow` takes two seconds, so it happens inside functions. Telemetry is off unless the user turned it on.
- The file store (`./mlruns`) is refused by MLflow 3; the local default is SQLite next to an artifact folder.
- Artifacts of a local store are written as plain files into the run's artifact folder; through the client this would
  cost 10 ms per candidate.
- `log_table` appends to a table that is already there, so a resumed study would repeat its rows. The table is therefore
  written in the same format, as a whole.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import sqlite3
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from ...errors import StudyError
from ...runners.files.atomic import remove_parts, write_whole
from .database import check_writable, creating, database_path, skip_flushes

if TYPE_CHECKING:
    from mlflow.entities import Run, RunInfo

T = TypeVar("T")

RUN_FILE = "mlflow_run.json"
_OWN = "own"  # in RUN_FILE in place of the URI: the study's own store moves with its folder
_LOCKED_WAITS = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds, each after SQLite's own five
_FULL = (errno.ENOSPC, errno.EDQUOT)


# ---- URIs ------------------------------------------------------------------------------------------------------------


def local_store(directory: Path) -> tuple[str, str]:
    """The tracking URI and the artifact location of a store of its own in a folder, both absolute."""
    folder = Path(directory).resolve()
    return f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlartifacts").as_uri()


def is_local(directory: Path, uri: str) -> bool:
    """Whether a URI is that of the store in this folder."""
    return uri == local_store(directory)[0]


def store_uri(directory: Path, uri: str | None = None) -> str:
    """The tracking URI of a study: the given one, else `MLFLOW_TRACKING_URI`, else the study's own store.

    SQLite paths become absolute. Raises `StudyError` for a URI that MLflow 3 cannot use.
    """
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI") or local_store(directory)[0]
    scheme = urlsplit(chosen).scheme
    if scheme in ("", "file"):
        raise StudyError(
            f"MLflow store {chosen!r}: MLflow 3 has no file store any more; write 'sqlite:///mlflow.db' "
            "or the address of a server such as 'http://127.0.0.1:5000'"
        )
    database = database_path(chosen)
    return f"sqlite:///{database}{chosen[len(chosen.partition('?')[0]) :]}" if database else chosen


def without_password(uri: str) -> str:
    """A URI as it may be printed and saved."""
    return re.sub(r"//[^/@]*@", "//***@", uri)


def artifact_folder(artifacts: str) -> Path | None:
    """Where a run's artifacts are stored, when that is a folder of this machine."""
    return Path(urllib.request.url2pathname(urlsplit(artifacts).path)) if artifacts.startswith("file:") else None


# ---- which run is a study's ------------------------------------------------------------------------------------------


def saved_run(directory: Path) -> dict[str, str]:
    """What `save_run` has written into a study's folder; empty when it never did."""
    try:
        data = json.loads((Path(directory) / RUN_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return {str(name): str(value) for name, value in data.items()} if isinstance(data, dict) else {}


def save_run(directory: Path, uri: str, study: str, run_id: str, experiment_id: str) -> None:
    """Write down in a study's folder which run is the study's, and in which store."""
    saved_as = _OWN if is_local(directory, uri) else without_password(uri)
    known = {"study": study, "run_id": run_id, "experiment_id": experiment_id, "uri": saved_as}
    try:
        write_whole(directory / RUN_FILE, json.dumps(known, indent=1).encode())
    except OSError as error:
        explain(error, uri)


def saved_uri(directory: Path) -> str | None:
    """The store that a study was last logged to, without a password; None when it never was."""
    uri = saved_run(directory).get("uri")
    return local_store(Path(directory))[0] if uri == _OWN else uri


def same_store(directory: Path, uri: str) -> bool:
    """Whether a study was last logged to this store."""
    return without_password(store_uri(directory, uri)) == saved_uri(directory)


def study_run(directory: Path, uri: str | None = None) -> tuple[Store, Run] | None:
    """The store that a study was last logged to and the study's run there; None when it never was.

    Args:
        directory: the study's folder.
        uri: the store that the configuration names, whose password is not saved.

    Raises:
        StudyError: the store cannot be used, or the run is no longer there.
    """
    directory = Path(directory).resolve()
    known, saved = saved_run(directory), saved_uri(directory)
    if saved is None or not known.get("run_id"):
        return None
    chosen = store_uri(directory, uri)
    if without_password(chosen) != saved:  # else it is the same, with the password
        chosen = saved
    if chosen.startswith("http"):
        check_reachable(chosen)
    if database := database_path(chosen):
        try:
            check_writable(database)
        except sqlite3.Error as error:
            explain(error, chosen)
    store = Store(chosen)
    run = store.call(store.client.get_run, known["run_id"])
    # In a folder that was moved or copied the run still points to where the folder was.
    elsewhere = known["uri"] == _OWN and not run.info.artifact_uri.startswith(local_store(directory)[1] + "/")
    if elsewhere or run.info.lifecycle_stage != "active" or run.data.tags.get("paretorch.study") != known.get("study"):
        raise StudyError(
            f"MLflow store {store.address} holds no run of the study in {directory}; the same search "
            "brings it there again: paretorch search CONFIG.yaml"
        )
    return store, run


# ---- use of a store --------------------------------------------------------------------------------------------------


def prepare_environment() -> None:
    """Turn off telemetry and chatter before `import mlflow`; what the user has set stays."""
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("MLFLOW_LOGGING_LEVEL", "WARNING"),
        ("GIT_PYTHON_REFRESH", "quiet"),
    ):
        os.environ.setdefault(name, value)
    # By name, for a process that has imported MLflow before and so has its level set already.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # It prints tracebacks of what it raises as well, and what is raised is explained to the user.
    logging.getLogger("mlflow.store.db.utils").disabled = True


def explain(error: Exception, uri: str) -> NoReturn:
    """Raise an error of a store as a `StudyError` that says what to do."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    store = f"MLflow store {without_password(uri)}"
    if (isinstance(error, OSError) and error.errno in _FULL) or "disk is full" in str(error):
        raise StudyError(
            f"{store}: the disk is full; free some space and run the same command again, it goes on where it stopped"
        ) from error
    if isinstance(error, OSError | sqlite3.Error):
        raise StudyError(
            f"{store} cannot be used: {text}; check that its folder exists and is "
            "writable, or name another store by MLFLOW_TRACKING_URI"
        ) from error
    raise StudyError(
        f"{store} refused: {text[:500]}; the study itself has lost nothing: the same "
        "command goes on, and brings MLflow up to date"
    ) from error


def check_reachable(uri: str) -> None:
    """Raise `StudyError` when no server answers; MLflow would try a wrong address again for minutes."""
    try:
        urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=10).close()
    except urllib.error.HTTPError:
        pass  # a server answers; rights are MLflow's to check
    except (OSError, ValueError) as error:
        raise StudyError(
            f"no MLflow server answers at {without_password(uri)} ({error}); start it, correct the address, or unset "
            "MLFLOW_TRACKING_URI to log into the study's own folder"
        ) from error


@contextlib.contextmanager
def opened(uri: str, own: bool) -> Iterator[tuple[Store, str | None]]:
    """A store, created if it is an SQLite file that is not there; other processes wait while it is created.

    Args:
        uri: as `store_uri` gives it.
        own: whether it is the store in the study's own folder.

    Yields:
        The store, and where a new experiment's artifacts belong (None: where the server says).

    Raises:
        StudyError: it cannot be used.
    """
    database = database_path(uri)
    if database is None:
        if uri.startswith("http"):
            check_reachable(uri)
        yield Store(uri), None
        return
    try:
        with creating(database, own) as write_ahead:
            store = Store(uri)
            yield store, (database.parent / "mlartifacts").as_uri()
            if write_ahead:
                skip_flushes(store.client)
    except (OSError, sqlite3.Error) as error:
        explain(error, uri)


class Store:
    """A connection to an MLflow store that exists, and how runs in it are written."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        prepare_environment()
        from mlflow import MlflowClient

        self.client: MlflowClient = self.call(MlflowClient, uri)

    @property
    def address(self) -> str:
        """The URI without a password."""
        return without_password(self.uri)

    def call(self, action: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Do something with the store: a busy one is tried again, any other error is explained."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        for wait in (*_LOCKED_WAITS, None):
            try:
                return action(*args, **kwargs)
            except (MlflowException, SQLAlchemyError, OSError) as error:
                if "database is locked" in str(error) and wait is not None:
                    time.sleep(wait)
                    continue
                explain(error, self.uri)
        raise AssertionError("unreachable")

    def search(self, experiment_id: str, where: str) -> list[Run]:
        """All runs of an experiment that match a filter, the oldest first."""
        runs: list[Run] = []
        token = None
        while True:
            page = self.call(
                self.client.search_runs,
                [experiment_id],
                where,
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def log(
        self,
        run_id: str,
        metrics: Mapping[str, float] | None = None,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        step: int = 0,
        now: int | None = None,
    ) -> None:
        """Write metrics, params and tags in one batch; `now` is in milliseconds since 1970."""
        from mlflow.entities import Metric, Param, RunTag

        stamp = now or int(time.time() * 1000)
        self.call(
            self.client.log_batch,
            run_id,
            metrics=[Metric(name, value, stamp, step) for name, value in (metrics or {}).items()],
            params=[Param(name, value) for name, value in (params or {}).items()],
            tags=[RunTag(name, value) for name, value in (tags or {}).items()],
        )

    def put(self, run: RunInfo, name: str, content: str | bytes) -> None:
        """Write one artifact of a run; its name may lead through a folder."""
        data = content.encode() if isinstance(content, str) else content
        try:
            if folder := artifact_folder(run.artifact_uri):
                write_whole(folder / name, data)
                return
            with tempfile.TemporaryDirectory() as local:
                home, _, file = name.rpartition("/")
                (Path(local) / file).write_bytes(data)
                self.call(self.client.log_artifact, run.run_id, str(Path(local) / file), home or None)
        except OSError as error:
            explain(error, self.uri)

    def put_table(self, run: RunInfo, name: str, rows: Sequence[Mapping[str, object]], digits: int = 6) -> None:
        """Write rows as one of MLflow's tables, beside the tables that the run has; numbers are rounded."""
        self.put(run, name, _table(rows, digits))
        tag = "mlflow.loggedArtifacts"
        known = json.loads(self.call(self.client.get_run, run.run_id).data.tags.get(tag, "[]"))
        if (entry := {"path": name, "type": "table"}) not in known:
            self.log(run.run_id, tags={tag: json.dumps([*known, entry])})

    def remove_parts(self, run: RunInfo) -> None:
        """Remove half-written files, which a kill has left among a run's artifacts."""
        if folder := artifact_folder(run.artifact_uri):
            remove_parts(folder)


def _table(rows: Sequence[Mapping[str, object]], digits: int) -> str:
    """Rows in the format of MLflow's tables."""

    def cell(value: object) -> object:
        if not isinstance(value, float):
            return value
        return float(f"{value:.{digits}g}") if math.isfinite(value) else str(value)  # JSON has no infinity

    columns = list(dict.fromkeys(name for row in rows for name in row)) or ["number"]
    return json.dumps({"columns": columns, "data": [[cell(row.get(name)) for name in columns] for row in rows]})
