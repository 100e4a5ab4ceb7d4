"""MLflow as a mirror of a study.

The study's own journal is the truth. MLflow gets one parent run per study and one child run per finished candidate,
whatever its end, and can be mended from the journal at any time (`Tracker.sync`): after a `kill -9`, after somebody
deleted runs, or when the study goes on into another store. So nothing here is ever read back to decide anything.

What shapes the code, all of it measured on MLflow 3.17:

- `import mlflow` takes two seconds, so it happens inside functions. Telemetry is off unless the user turned it on.
- The file store (`./mlruns`) is refused by MLflow 3; the local default is SQLite next to an artifact folder.
- Two processes that create one SQLite store at once crash in its migrations, so that is done under a file lock.
- A candidate is written in one go at its end (create, one batch, terminate): a kill leaves at most one RUNNING run.
- Five sixths of the time to write a candidate is SQLite waiting for the disk. A database made here is therefore put
  into write-ahead mode and, by this process, not flushed at every commit: the file stays whole after a power cut, and
  what the last commits held is mended from the journal. 136 -> 28 ms per candidate (60 params, 20 metrics, busy disk).
- Artifacts of a local store are written as plain files where the run says they live; asking the client for the same
  costs 10 ms per candidate.
- `log_table` appends to a table that is already there, so a resumed study would repeat its rows; the table is
  therefore written in the same format, whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import posixpath
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from ...errors import ArtifactError, StudyError
from ...objectives.measurement import flat
from ...runners.files.atomic import remove_parts, write_whole
from ..candidate import FAILED, Candidate
from ..report.tables import rows
from ..report.write import FILES

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from ..front import Front

T = TypeVar("T")

RUN_FILE = "mlflow_run.json"
_PARENT = "mlflow.parentRunId"
_NOTE = "mlflow.note.content"
_TAG, _PARAM, _KEY = 8000, 6000, 250  # characters that MLflow keeps; longer texts are cut, keys refused
_UNFINISHED = ("RUNNING", "SCHEDULED")
_LOCKED_WAITS = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # after SQLite's own five seconds each
_FULL = (errno.ENOSPC, errno.EDQUOT)


def local_store(directory: Path) -> tuple[str, str]:
    """The tracking URI and the artifact location of a store of its own in a folder, both absolute."""
    folder = Path(directory).resolve()
    return f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlartifacts").as_uri()


def store_uri(directory: Path, uri: str | None = None) -> str:
    """The tracking URI that holds for a study: the given one, `MLFLOW_TRACKING_URI`, or the study's own store.

    SQLite paths become absolute. Raises `StudyError` for a URI that MLflow 3 cannot use.
    """
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI") or local_store(directory)[0]
    scheme = urlsplit(chosen).scheme
    if scheme in ("", "file"):
        raise StudyError(
            f"MLflow store {chosen!r}: MLflow 3 has no file store any more; write 'sqlite:///mlflow.db' "
            "or the address of a server such as 'http://127.0.0.1:5000'"
        )
    database = _database(chosen)
    return f"sqlite:///{database}{chosen[len(chosen.partition('?')[0]) :]}" if database else chosen


def _database(uri: str) -> Path | None:
    """The file of an SQLite URI, absolute; None for any other store."""
    if not uri.startswith("sqlite"):
        return None
    name = uri.partition("?")[0].partition("://")[2].removeprefix("/")
    if not name or name == ":memory:":
        raise StudyError(f"MLflow store {uri!r}: name a file, such as 'sqlite:///mlflow.db'")
    return Path(name).expanduser().resolve()


def _remote(folder: Path) -> bool:
    """Whether a folder lies on a network file system, where SQLite's write-ahead mode is not safe."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return False
    holding = [(len(m[1]), m[2]) for m in mounts if folder.is_relative_to(m[1].replace("\\040", " "))]
    kind = max(holding, default=(0, ""))[1]
    return kind.startswith(("nfs", "cifs", "smb", "9p", "lustre", "beegfs", "gpfs", "ceph", "glusterfs", "fuse.sshfs"))


def _shown(uri: str) -> str:
    """A URI without a password."""
    return re.sub(r"//[^/@]*@", "//***@", uri)


def _prepare() -> None:
    """Privacy and quiet, before `import mlflow`; whatever the user has set stays."""
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


_CREATING = "creating"  # in the lock file while a new store gets its tables


@contextlib.contextmanager
def _sole(lock: Path, seconds: float = 180.0) -> Iterator[None]:
    """Hold a lock file, which goes with the process however that ends."""
    with lock.open("a") as handle:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StudyError(f"another process has been setting up the MLflow store for {seconds:.0f} s; "
                                     f"end it, then run again (lock file {lock})") from None  # fmt: skip
                time.sleep(0.05)
        yield


def _explain(error: Exception, uri: str) -> NoReturn:
    """Raise what a person can act on."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    if (isinstance(error, OSError) and error.errno in _FULL) or "disk is full" in str(error):
        raise StudyError(f"MLflow store {_shown(uri)}: the disk is full; free some space and run the same command "
                         "again, it goes on where it stopped") from error  # fmt: skip
    if isinstance(error, OSError | sqlite3.Error):
        raise StudyError(f"MLflow store {_shown(uri)} cannot be used: {text}; check that its folder exists and is "
                         "writable, or name another store by MLFLOW_TRACKING_URI") from error  # fmt: skip
    raise StudyError(f"MLflow store {_shown(uri)} refused: {text[:500]}; the study itself has lost nothing: the same "
                     "command goes on, and brings MLflow up to date") from error  # fmt: skip


def _reachable(uri: str) -> None:
    """Without this a wrong address would be retried for minutes."""
    try:
        urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=10).close()
    except urllib.error.HTTPError:
        pass  # somebody answers; rights are MLflow's to check
    except (OSError, ValueError) as error:
        raise StudyError(f"no MLflow server answers at {_shown(uri)} ({error}); start it, correct the address, or unset "
                         "MLFLOW_TRACKING_URI to log into the study's own folder") from error  # fmt: skip


def _key(text: str) -> str:
    """A text as a name of a param, metric or tag that MLflow accepts."""
    name = re.sub(r"[^A-Za-z0-9_./ :-]", "_", text).strip()[:_KEY] or "_"
    # MLflow also wants a name that is a path relative to nothing else.
    if posixpath.normpath(name) != name or name.startswith((".", "/")):
        name = "_" + name.replace("/", "_")[: _KEY - 1]
    return name


def accepted(named: Mapping[str, T]) -> dict[str, T]:
    """The same values under names that MLflow accepts, no two alike."""
    out: dict[str, T] = {}
    for text, value in named.items():
        name, tries = _key(text), 1
        while name in out:
            tries += 1
            name = f"{_key(text)[: _KEY - 8]}_{tries}"
        out[name] = value
    return out


def _limit_name(text: str) -> str:
    """A limit's text in the characters of a metric name: `size_bytes at most 25 percent`."""
    return text.replace("<=", "at most").replace(">=", "at least").replace("%", " percent").replace("  ", " ")


def _numbers(candidate: Candidate) -> dict[str, float]:
    """All metrics of a candidate, by their MLflow names."""
    out: dict[str, float] = {}
    if candidate.measurement:
        out |= flat(candidate.measurement.metrics)
        out.update({f"seconds.{phase}": value for phase, value in candidate.measurement.seconds.items()})
    out.update({f"excess.{_limit_name(text)}": value for text, value in candidate.excess.items()})
    return out


_NO_MEMBER = {"paretorch.front": "false", "paretorch.cluster": "false", "paretorch.recommended": "false"}


def _verdicts(front: Front, member: Candidate) -> dict[str, str]:
    """The tags of a member of the front: `speed`, `cluster`, `recommended` (the one of its cluster), `parity`."""
    said = front.verdicts(member)
    tags = {f"paretorch.{name}": str(value)[:_TAG] for name, value in said.items()}
    return tags | {
        "paretorch.front": "true",
        "paretorch.recommended": str(said.get("cluster") == member.number).lower(),
    }


class _Child:
    """What this process knows of a child run."""

    def __init__(self, run_id: str, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        self.run_id, self.metrics, self.tags = run_id, dict(metrics), dict(tags)


class Store:
    """An MLflow store and how runs in it are written: busy is tried again, anything else is explained."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @property
    def address(self) -> str:
        """The URI without a password."""
        return _shown(self.uri)

    def _connect(self) -> None:
        _prepare()
        from mlflow import MlflowClient

        self._client: MlflowClient = self._call(lambda: MlflowClient(self.uri))

    def _call(self, action: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Do something with the store: busy is tried again, anything else is explained."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        for wait in (*_LOCKED_WAITS, None):
            try:
                return action(*args, **kwargs)
            except (MlflowException, SQLAlchemyError, OSError) as error:
                if "database is locked" in str(error) and wait is not None:
                    time.sleep(wait)
                    continue
                _explain(error, self.uri)
        raise AssertionError("unreachable")

    def _batch(
        self,
        run_id: str,
        metrics: Mapping[str, float] | None = None,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        step: int = 0,
        now: int | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        stamp = now or int(time.time() * 1000)
        self._call(
            self._client.log_batch,
            run_id,
            metrics=[Metric(name, value, stamp, step) for name, value in (metrics or {}).items()],
            params=[Param(name, value) for name, value in (params or {}).items()],
            tags=[RunTag(name, value) for name, value in (tags or {}).items()],
        )

    def _put(self, run_id: str, artifacts: str, name: str, content: str | bytes) -> None:
        """Write one artifact; its name may lead through a folder."""
        data = content.encode() if isinstance(content, str) else content
        try:
            if folder := _folder(artifacts):
                write_whole(folder / name, data)
                return
            with tempfile.TemporaryDirectory() as local:
                home, _, file = name.rpartition("/")
                (Path(local) / file).write_bytes(data)
                self._call(self._client.log_artifact, run_id, str(Path(local) / file), home or None)
        except OSError as error:
            _explain(error, self.uri)

    def _put_sensitivity(self, run_id: str, artifacts: str, directory: Path) -> None:
        """Write the sensitivity files of a study's folder, when it has them, and the heat map as a table."""
        source = directory / "sensitivity.json"
        if not source.is_file():
            return
        from ...runners.sensitivity import Sensitivity
        from ..report.heatmap import FILES, heat_rows

        for name in FILES:
            if (path := directory / name).is_file():
                self._put(run_id, artifacts, f"sensitivity/{name}", path.read_bytes())
        try:
            found = Sensitivity.from_json(source.read_text(errors="replace"))
        except ArtifactError:  # of a newer version, or edited by hand: the files are shown as they are
            return
        self._put_table(run_id, artifacts, "sensitivity/sensitivity_table.json", heat_rows(found), digits=3)

    def _put_targets(self, run_id: str, artifacts: str, directory: Path) -> None:
        """Write what a study's front was found to be on other targets, each as it is and as a table."""
        from ..retarget import FOLDER, table_rows

        for path in sorted((directory / FOLDER).glob("*.json")):
            text = path.read_text(errors="replace")
            self._put(run_id, artifacts, f"{FOLDER}/{path.name}", text)
            try:
                data = table_rows(json.loads(text))
            except (
                ValueError,
                KeyError,
                TypeError,
            ):  # of a newer version, or edited by hand: the file is shown as it is
                continue
            self._put_table(run_id, artifacts, f"{FOLDER}/{path.stem}_table.json", data)

    def _put_table(
        self, run_id: str, artifacts: str, name: str, data: Sequence[Mapping[str, object]], digits: int = 6
    ) -> None:
        """Write rows as one of MLflow's tables, beside the tables that the run has."""
        self._put(run_id, artifacts, name, _table(data, digits))
        tag = "mlflow.loggedArtifacts"
        known = json.loads(self._call(self._client.get_run, run_id).data.tags.get(tag, "[]"))
        if (entry := {"path": name, "type": "table"}) not in known:
            self._batch(run_id, tags={tag: json.dumps([*known, entry])})


def _folder(artifacts: str) -> Path | None:
    """Where a run's artifacts lie, when that is a folder of this machine."""
    return Path(urllib.request.url2pathname(urlsplit(artifacts).path)) if artifacts.startswith("file:") else None


def _sweep(artifacts: str) -> None:
    """Remove what a kill has left half-written among a run's artifacts."""
    if folder := _folder(artifacts):
        remove_parts(folder)


class Tracker(Store):
    """Writes one study into MLflow: `start`, `sync` after a resume, `log` per candidate, `finish`.

    `uri` defaults to `MLFLOW_TRACKING_URI`, then to a SQLite store in the study's folder. `experiment` defaults to
    `paretorch/<study_name>`. Which run is the study's is kept in `mlflow_run.json` in the study's folder. The caller
    sees to it that one process at a time writes a study; different studies may share a store at the same time.

    Raises `StudyError`, with what to do, when the store cannot be used, is full or does not answer. A store that is
    busy for a moment (`database is locked`) is tried again.
    """

    def __init__(self, study_name: str, directory: Path, uri: str | None = None, experiment: str | None = None) -> None:
        self.study_name = study_name
        self.directory = Path(directory).resolve()
        super().__init__(store_uri(self.directory, uri))
        self.experiment = experiment or f"paretorch/{study_name}"
        self.run_id = ""
        self._artifacts = ""
        self._children: dict[int, _Child] = {}
        self._steps: set[int] = set()
        self._own = self.uri == local_store(self.directory)[0]
        database = _database(self.uri)
        if database is None:
            if self.uri.startswith("http"):
                _reachable(self.uri)
            self._open(None)
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            database.parent.mkdir(parents=True, exist_ok=True)
            lock = database.with_name(database.name + ".lock")
            with _sole(lock):
                if lock.read_text() == _CREATING:  # and was killed: half a schema is of no use to anybody
                    for suffix in ("", "-wal", "-shm"):
                        database.with_name(database.name + suffix).unlink(missing_ok=True)
                fresh = not database.exists()
                ours = self._own or fresh
                if fresh:
                    lock.write_text(_CREATING)
                # MLflow retries a bad file for minutes; SQLite says at once what is wrong with it.
                with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection:
                    connection.execute("BEGIN IMMEDIATE")
                    connection.rollback()
                    if ours and not _remote(database.parent):
                        connection.execute("PRAGMA journal_mode=WAL")
                    ahead = connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
                self._open((database.parent / "mlartifacts").as_uri())
                if fresh:
                    lock.write_text("")
                if ahead:
                    self._hurry()
        except (OSError, sqlite3.Error) as error:
            _explain(error, self.uri)

    def _open(self, artifacts: str | None) -> None:
        self._connect()
        found = self._call(self._client.get_experiment_by_name, self.experiment)
        if found and found.lifecycle_stage == "deleted":
            raise StudyError(f"MLflow experiment {self.experiment!r} was deleted in {_shown(self.uri)}; restore it "
                             f"(mlflow experiments restore -x {found.experiment_id}) or name another one")  # fmt: skip
        if found and self._own and found.artifact_location != artifacts:
            # The study's folder was moved or copied: artifact addresses in the store are absolute, so the mirror is
            # made anew here; the old one stays restorable under its new name.
            self._call(self._client.rename_experiment, found.experiment_id, f"{self.experiment} (moved {uuid.uuid4().hex[:6]})")  # fmt: skip
            self._call(self._client.delete_experiment, found.experiment_id)
            found = None
        self.experiment_id: str = found.experiment_id if found else self._create_experiment(artifacts)

    def _hurry(self) -> None:
        """Do not wait for the disk at every commit; only where the file survives a power cut all the same."""
        from sqlalchemy import event

        # The engine is an inner part of MLflow's client; without it everything works, at half the speed.
        engine = getattr(getattr(getattr(self._client, "_tracking_client", None), "store", None), "engine", None)
        if engine is not None:
            engine.dispose()

            @event.listens_for(engine, "connect")
            def relax(connection: Any, _: object) -> None:
                connection.execute("PRAGMA synchronous=NORMAL")

    def _create_experiment(self, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.create_experiment(
                self.experiment,
                artifact_location=artifacts,
                tags={
                    "mlflow.experimentKind": "custom_model_development",
                    _NOTE: "Each top-level run is one compression search; its children are the candidates it tried. "
                    "Open a search for its front (front.html), its report and how to use the best recipe.",
                },
            )
        except MlflowException as error:
            # On a server another search may have created it in the meantime.
            found = self._client.get_experiment_by_name(self.experiment)
            if found is None:
                _explain(error, self.uri)
            return str(found.experiment_id)

    def start(self, params: Mapping[str, str], texts: Mapping[str, str], environment: Mapping[str, str]) -> str:
        """Create the study's parent run, or attach to it again, and give its id.

        `params` are written once: those that are there already keep their first value. `texts` become artifacts by
        their file names; `environment` becomes `environment.json` and tags.
        """
        saved = _saved(self.directory)
        study = saved.get("study") or uuid.uuid4().hex
        self._save(study)
        run = self._find(study, saved.get("run_id", ""))
        tags = {
            "paretorch.role": "search",
            "paretorch.study": study,
            "paretorch.study_dir": str(self.directory),
            "paretorch.host": socket.gethostname(),
        }
        if run is None:
            self._close_strays(tags)
            run = self._call(self._client.create_run, self.experiment_id, tags=tags, run_name=self.study_name)
        else:
            self._call(self._client.update_run, run.info.run_id, status="RUNNING")
        self.run_id, self._artifacts = run.info.run_id, run.info.artifact_uri
        self._save(study)

        there = run.data.params
        tags |= {f"paretorch.env.{name}": value[:_TAG] for name, value in environment.items()}
        new = {name: value[:_PARAM] for name, value in accepted(params).items() if name not in there}
        self._batch(self.run_id, params=new, tags=accepted(tags))
        for name, text in texts.items():
            self._put(self.run_id, self._artifacts, name, text)
        self._put(self.run_id, self._artifacts, "environment.json", json.dumps(dict(environment), indent=1))
        self._put_sensitivity(self.run_id, self._artifacts, self.directory)
        self._put_targets(self.run_id, self._artifacts, self.directory)
        return self.run_id

    def _find(self, study: str, run_id: str) -> Run | None:
        """The study's parent run in this store, if it is there."""
        from mlflow.exceptions import MlflowException

        if run_id:
            try:
                run = self._client.get_run(run_id)
                if self._belongs(run, study):
                    return run
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    _explain(error, self.uri)
        found = self._search(f"tags.`paretorch.study` = '{study}' and tags.`paretorch.role` = 'search'")
        return next((run for run in found if self._belongs(run, study)), None)

    def _belongs(self, run: Run, study: str) -> bool:
        return bool(
            run.info.lifecycle_stage == "active"
            and run.info.experiment_id == self.experiment_id
            and run.data.tags.get("paretorch.study") == study
            and run.data.tags.get("paretorch.role") == "search"
        )

    def _close_strays(self, tags: Mapping[str, str]) -> None:
        """End what an earlier study in this very folder, since removed, has left RUNNING."""
        where = " and ".join(
            f"tags.`{name}` = '{_quoted(tags[name])}'"
            for name in ("paretorch.role", "paretorch.study_dir", "paretorch.host")
        )
        for parent in self._search(where):
            children = self._search(f"tags.`{_PARENT}` = '{parent.info.run_id}'")
            for run in (*children, parent):
                if run.info.status in _UNFINISHED:
                    self._call(self._client.set_terminated, run.info.run_id, "KILLED")

    def _search(self, where: str) -> list[Run]:
        found: list[Run] = []
        token = None
        while True:
            page = self._call(
                self._client.search_runs, [self.experiment_id], where, max_results=1000,
                order_by=["attributes.start_time ASC"], page_token=token,
            )  # fmt: skip
            found += page
            token = page.token
            if not token:
                return found

    def log(self, candidate: Candidate, hypervolume: float, on_front: bool, picks: Mapping[str, object]) -> None:
        """Write one finished candidate as a child run, and the hypervolume after it on the parent.

        A candidate that is there already is left alone. `picks` are the choices in readable values.
        """
        if candidate.number not in self._children:
            now = int(time.time() * 1000)
            seconds = sum(candidate.measurement.seconds.values()) if candidate.measurement else 0.0
            tags = {
                _PARENT: self.run_id,
                "paretorch.role": "trial",
                "paretorch.number": str(candidate.number),
                "paretorch.state": candidate.state,
                "paretorch.reason": candidate.reason[:500],
                "paretorch.label": candidate.label[:500],
                "paretorch.recipe_key": candidate.recipe.key,
                "paretorch.what": candidate.recipe.describe()[:500],
                "paretorch.front": str(on_front).lower(),
            }
            # The start is set back, so that MLflow's column of durations tells how long the candidate took.
            run = self._call(
                self._client.create_run, self.experiment_id, start_time=now - round(1000 * seconds),
                tags={name: value for name, value in tags.items() if value},
                run_name=f"trial-{candidate.number:04d}" + (f" {candidate.label}"[:200] if candidate.label else ""),
            )  # fmt: skip
            run_id, metrics = run.info.run_id, accepted(_numbers(candidate))
            params = {name: str(value)[:_PARAM] for name, value in accepted(picks).items()}
            self._batch(run_id, metrics=metrics, params=params, now=now)
            self._put(run_id, run.info.artifact_uri, "recipe.json", json.dumps(candidate.recipe.to_dict(), indent=1))
            self._call(self._client.set_terminated, run_id, "FAILED" if candidate.state == FAILED else "FINISHED", now)
            self._children[candidate.number] = _Child(run_id, metrics, tags)
        if candidate.number not in self._steps:
            self._batch(self.run_id, metrics={"hypervolume": hypervolume}, step=candidate.number)
            self._steps.add(candidate.number)

    def sync(
        self,
        candidates: Sequence[Candidate],
        hypervolumes: Sequence[float],
        picks_of: Callable[[Candidate], Mapping[str, object]],
    ) -> int:
        """Make the child runs those of the candidates: after `start` of a resumed study.

        Runs left RUNNING by a kill, duplicates and runs that fit no candidate are removed; candidates without a run are
        logged. `hypervolumes` stand beside the candidates. Returns how many candidates' runs were mended.
        """
        known = {candidate.number: candidate for candidate in candidates}
        _sweep(self._artifacts)
        self._children.clear()
        mended: set[str] = set()
        for run in self._search(f"tags.`{_PARENT}` = '{self.run_id}'"):
            tags = run.data.tags
            text = tags.get("paretorch.number", "")
            candidate = known.get(int(text)) if text.isdigit() else None
            if (
                candidate is None
                or candidate.number in self._children
                or run.info.status in _UNFINISHED
                or (tags.get("paretorch.recipe_key"), tags.get("paretorch.state"))
                != (candidate.recipe.key, candidate.state)
            ):
                if run.info.status in _UNFINISHED:  # a deleted run keeps its status, and this one runs no more
                    self._call(self._client.set_terminated, run.info.run_id, "KILLED")
                    _sweep(run.info.artifact_uri)
                self._call(self._client.delete_run, run.info.run_id)
                mended.add(text)
                continue
            self._children[candidate.number] = _Child(run.info.run_id, run.data.metrics, tags)
        self._steps = {entry.step for entry in self._call(self._client.get_metric_history, self.run_id, "hypervolume")}
        for candidate, volume in zip(candidates, hypervolumes, strict=True):
            if candidate.number not in self._children:
                mended.add(str(candidate.number))
            self.log(candidate, volume, False, picks_of(candidate))
        return len(mended)

    def finish(
        self, front: Front, report: Path, note: str, status: str = "FINISHED", more: Mapping[str, float] | None = None
    ) -> None:
        """Write what the study found onto the parent run and end it with `status`.

        `report` is the folder with the files of `write_report`; those that are there are uploaded. `note` is markdown
        for the run's description, `more` are further metrics of the run. Children get the finalists' test metrics, the
        final word on who is on the front, and as tags what is said of members (`Front.verdicts`).
        """
        for name in FILES:
            if (path := Path(report) / name).is_file():
                self._put(self.run_id, self._artifacts, name, path.read_bytes())
        self._put_table(self.run_id, self._artifacts, "front_table.json", rows(front))
        self._put_sensitivity(self.run_id, self._artifacts, self.directory)
        self._put_targets(self.run_id, self._artifacts, self.directory)

        members = {member.number for member in front.members}
        for candidate in front.candidates:
            child = self._children.get(candidate.number)
            if child is None:
                continue
            tests = accepted({f"test_{name}": value for name, value in flat(candidate.test).items()})
            tests = {name: value for name, value in tests.items() if child.metrics.get(name) != value}
            tags = _verdicts(front, candidate) if candidate.number in members else _NO_MEMBER
            tags = {name: value for name, value in tags.items() if child.tags.get(name, "false") != value}
            if tests or tags:
                self._batch(child.run_id, metrics=tests, tags=tags)
                child.metrics |= tests
                child.tags |= tags

        states = [candidate.state for candidate in front.candidates]
        numbers = {f"baseline.{name}": metric.value for name, metric in front.baseline.metrics.items()}
        numbers |= {f"candidates.{state}": float(states.count(state)) for state in sorted(set(states))}
        numbers |= {"front.size": float(len(members)), **(more or {})}
        there = self._call(self._client.get_run, self.run_id).data.metrics
        # A picture by its relative path means nothing in a run's description.
        text = re.sub(r"^!\[[^\n]*\n+", "", note, flags=re.MULTILINE)
        self._batch(
            self.run_id,
            metrics={name: value for name, value in accepted(numbers).items() if there.get(name) != value},
            tags={_NOTE: _cut(text)},
        )
        self._call(
            self._client.set_experiment_tag, self.experiment_id, f"mlflow.sharedViewState.{_view_key(self.run_id)}",
            _view(front, self.run_id),
        )  # fmt: skip
        self._call(self._client.set_terminated, self.run_id, status)

    def url_hint(self) -> str:
        """How to open the study: a link for a server, else the command that starts the UI."""
        if self.uri.startswith("http"):
            return _shown(self.uri).rstrip("/") + page(self.directory)
        return f"paretorch ui {self.directory}" if self._own else f"mlflow ui --backend-store-uri {_shown(self.uri)}"

    def _save(self, study: str) -> None:
        # "own" instead of a path: the study's own store moves with its folder.
        known = {
            "study": study,
            "run_id": self.run_id,
            "experiment_id": self.experiment_id,
            "uri": "own" if self._own else _shown(self.uri),
        }
        try:
            write_whole(self.directory / RUN_FILE, json.dumps(known, indent=1).encode())
        except OSError as error:
            _explain(error, self.uri)


def _cut(text: str) -> str:
    """Markdown short enough for a description, ended between two lines and outside a block of code."""
    if len(text) <= _TAG:
        return text
    end = "\n\n(The rest is in report.md.)"
    kept = text[: _TAG - len(end) - 8].rpartition("\n")[0] or text[: _TAG - len(end) - 8]
    fence = "\n```" if kept.count("```") % 2 else ""
    return kept + fence + end


def _quoted(text: str) -> str:
    """A text inside a filter; MLflow's filters know no escape, so a quote matches nothing."""
    return text.replace("'", "")


def _saved(directory: Path) -> dict[str, str]:
    try:
        data = json.loads((directory / RUN_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return {str(name): str(value) for name, value in data.items()} if isinstance(data, dict) else {}


def saved_uri(directory: Path) -> str | None:
    """The store that a study was last logged to, without a password; None when it never was."""
    uri = _saved(Path(directory)).get("uri")
    return local_store(Path(directory))[0] if uri == "own" else uri


def same_store(directory: Path, uri: str) -> bool:
    """Whether a study was last logged to this store."""
    return _shown(store_uri(directory, uri)) == saved_uri(directory)


def study_run(directory: Path, uri: str | None = None) -> tuple[Store, Run] | None:
    """The store that a study was last logged to and the study's run there; None when it never was.

    `uri` is the store that the configuration names. Raises `StudyError` when the store cannot be used or the run is no
    longer there.
    """
    directory = Path(directory).resolve()
    known, saved = _saved(directory), saved_uri(directory)
    if saved is None or not known.get("run_id"):
        return None
    chosen = store_uri(directory, uri)
    if _shown(chosen) != saved:  # else it is the same, with the password that is not saved
        chosen = saved
    if chosen.startswith("http"):
        _reachable(chosen)
    if database := _database(chosen):
        try:  # MLflow would make a missing file, and retry a bad one for minutes
            address = f"{database.as_uri()}?mode=rw"
            with contextlib.closing(sqlite3.connect(address, timeout=60, uri=True)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.rollback()
        except sqlite3.Error as error:
            _explain(error, chosen)
    store = Store(chosen)
    store._connect()
    run = store._call(store._client.get_run, known["run_id"])
    # In a folder that was moved or copied the run still points to where the folder was.
    elsewhere = known["uri"] == "own" and not run.info.artifact_uri.startswith(local_store(directory)[1] + "/")
    if elsewhere or run.info.lifecycle_stage != "active" or run.data.tags.get("paretorch.study") != known.get("study"):
        raise StudyError(f"MLflow store {_shown(chosen)} holds no run of the study in {directory}; the same search "
                         "brings it there again: paretorch search CONFIG.yaml")  # fmt: skip
    return store, run


def add_sensitivity(directory: Path, uri: str | None = None) -> bool:
    """Put the sensitivity files of a study's folder into its MLflow run; False when it has none.

    `uri` is the store that the configuration names. Nothing else in the store is touched. Raises `StudyError` when the
    store cannot be used or the run is no longer there.
    """
    return _add(directory, uri, Store._put_sensitivity)


def add_targets(directory: Path, uri: str | None = None) -> bool:
    """Put what `retarget` wrote into a study's folder into its MLflow run; False when it has none. As `add_sensitivity`."""
    return _add(directory, uri, Store._put_targets)


def _add(directory: Path, uri: str | None, put: Callable[[Store, str, str, Path], None]) -> bool:
    found = study_run(directory, uri)
    if found is None:
        return False
    store, run = found
    put(store, run.info.run_id, run.info.artifact_uri, Path(directory).resolve())
    return True


def _view_key(run_id: str) -> str:
    return f"paretorch-{run_id[:12]}"


def page(directory: Path) -> str:
    """The part of the MLflow address that shows a study's candidates as charts; to be put behind a server's address."""
    known = _saved(Path(directory))
    base = "/#/experiments"
    if not known.get("run_id"):
        return f"{base}?workflowType=machine_learning"
    return (
        f"{base}/{known['experiment_id']}/runs?workflowType=machine_learning"
        f"&compareRunsMode=CHART&viewStateShareKey={_view_key(known['run_id'])}"
    )


def _table(data: Sequence[Mapping[str, object]], digits: int) -> str:
    """Rows in the format of MLflow's tables, numbers rounded."""

    def cell(value: object) -> object:
        if not isinstance(value, float):
            return value
        return float(f"{value:.{digits}g}") if math.isfinite(value) else str(value)  # JSON has no infinity

    columns = list(dict.fromkeys(name for row in data for name in row)) or ["number"]
    return json.dumps({"columns": columns, "data": [[cell(row.get(name)) for name in columns] for row in data]})


def _influential(front: Front, metric: str, count: int = 6) -> list[str]:
    """The choices that went along with the metric most, by the size of their correlation."""
    import numpy as np

    seen = [c for c in front.candidates if c.picks and c.measurement and metric in c.measurement.metrics]
    if len(seen) < 3:
        return []
    values = np.array([c.measurement.value(metric) for c in seen])  # type: ignore[union-attr]
    strength = {}
    for name in sorted({name for c in seen for name in c.picks or {}}):
        chosen = np.array([(c.picks or {}).get(name, 0) for c in seen], dtype=float)
        if chosen.std() > 0 and values.std() > 0:
            strength[name] = abs(float(np.corrcoef(chosen, values)[0, 1]))
    return sorted(strength, key=lambda name: -strength[name])[:count]


def _view(front: Front, run_id: str) -> str:
    """The state of MLflow's chart page for a study, as its UI keeps it.

    By itself the page draws parents only. This state is internal to MLflow's UI and nothing depends on it: a UI that
    does not know it any more shows its default page.
    """
    quality = front.quality
    costs = [
        name for name in ("size_bytes", "latency_ms", "macs") if name in front.baseline.metrics and name != quality
    ]
    common = {"metricSectionId": "paretorch-front", "deleted": False, "isGenerated": False, "runsCountToCompare": 500}
    charts: list[dict[str, Any]] = [
        {
            **common,
            "uuid": f"paretorch-{cost}",
            "type": "SCATTER",
            "xaxis": {"key": cost, "type": "METRIC"},
            "yaxis": {"key": quality, "type": "METRIC"},
        }
        for cost in costs[:2]
    ]
    params = [_key(name) for name in _influential(front, quality)]
    charts.append(
        {
            **common,
            "metricSectionId": "paretorch-choices",
            "uuid": "paretorch-parallel",
            "type": "PARALLEL",
            "selectedParams": params,
            "selectedMetrics": [*costs[:2], quality],
            "showAllRuns": True,
        }
    )
    shown = [f"metrics.`{name}`" for name in (quality, *costs)]
    shown += [f"tags.`paretorch.{name}`" for name in ("front", "state", "reason", "what")]
    state = {
        "searchFilter": f"tags.`paretorch.role` = 'trial' and tags.`{_PARENT}` = '{run_id}'",
        "orderByKey": f"metrics.`{quality}`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": shown,
        "runsHiddenMode": "SHOW_ALL",
        "compareRunSections": [
            {
                "uuid": uuid,
                "name": name,
                "columns": columns,
                "cardHeight": height,
                "display": True,
                "isReordered": False,
                "deleted": False,
                "isGenerated": False,
            }
            for uuid, name, columns, height in (
                ("paretorch-front", "All candidates", max(1, len(costs[:2])), 420),
                ("paretorch-choices", "Choices that went with the metric", 1, 420),
            )
        ],
        "compareRunCharts": charts,
    }
    return json.dumps(state)


def _free_port(port: int) -> int:
    """The asked port, or another one when it is taken."""
    for wanted in (port, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", wanted))
                return int(probe.getsockname()[1])
    raise StudyError("no free port on 127.0.0.1")


def serve(uri: str, artifact_root: str | None, port: int, link: str = "/#/experiments") -> int:
    """Run MLflow's UI on a store until Ctrl-C, reachable from this machine only, and give its exit code.

    `link` is the page to point at, as `page` gives it. A store that is a server already is only pointed at. When the
    port is taken a free one is chosen. Raises `StudyError` when the server does not come up, with its last words.
    """
    if uri.startswith("http"):
        print(f"MLflow: {_shown(uri).rstrip('/')}{link}")
        return 0
    chosen = _free_port(port)
    if chosen != port:
        print(f"Port {port} is taken; using {chosen}.")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1",
               "--port", str(chosen), "--workers", "1"]  # fmt: skip
    if artifact_root:
        command += ["--default-artifact-root", artifact_root]
    _prepare()
    # MLflow starts its web server by name, so the environment's programs must be found; the job runner would take
    # two gigabytes for nothing that a study uses.
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    environment = os.environ | {"PATH": os.pathsep.join(folders), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with tempfile.TemporaryFile() as output:
        # Its own session: Ctrl-C reaches only us, and all of the server's processes are ended together.
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)

        def stop(*_: object) -> NoReturn:
            raise KeyboardInterrupt

        # SIGINT too: a shell that starts a program in the background has it ignored.
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            print(f"Starting MLflow's UI on {_shown(uri)} ...", flush=True)
            _await(server, chosen, output)
            print(f"Open http://127.0.0.1:{chosen}{link}\nCtrl-C ends it.", flush=True)
            return server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            _end(server)


def _await(server: subprocess.Popen[bytes], port: int, output: Any, seconds: float = 180.0) -> None:
    """Wait until the server answers."""
    deadline = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    output.seek(0)
    last = output.read().decode(errors="replace").strip().splitlines()[-5:]
    raise StudyError("MLflow's UI did not come up:\n  " + "\n  ".join(last or ["(it said nothing)"]))


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server with all its processes."""
    for ending in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, ending)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(10)
            return
