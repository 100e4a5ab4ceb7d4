"""The SQLite file of a local MLflow store.

Measured on MLflow 3.17:

- Two processes that create one SQLite store at the same time crash in its migrations, so it is created under a lock.
- Five sixths of the time to write a candidate is SQLite waiting for the disk. A database created here therefore uses
  write-ahead logging and is, by this process, not flushed at every commit. The file survives a power cut; the last
  commits may be lost and are restored from the journal. 136 -> 28 ms per candidate (60 params, 20 metrics, busy disk).
- MLflow retries a file that is no database for minutes; SQLite itself refuses it at once, so SQLite is asked first.
"""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import StudyError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_CREATING = "creating"  # the text of the lock file while a new store gets its tables
_NETWORK = ("nfs", "cifs", "smb", "9p", "lustre", "beegfs", "gpfs", "ceph", "glusterfs", "fuse.sshfs")


def database_path(uri: str) -> Path | None:
    """The file of an SQLite URI, absolute; None for any other store. Raises `StudyError` when it names no file."""
    if not uri.startswith("sqlite"):
        return None
    name = uri.partition("?")[0].partition("://")[2].removeprefix("/")
    if not name or name == ":memory:":
        raise StudyError(f"MLflow store {uri!r}: name a file, such as 'sqlite:///mlflow.db'")
    return Path(name).expanduser().resolve()


def check_writable(database: Path) -> None:
    """Raise `sqlite3.Error` unless the file is there and is a database that can be written."""
    # With mode=rw a missing file is not created.
    with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=rw", timeout=60, uri=True)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()


@contextlib.contextmanager
def creating(database: Path, own: bool) -> Iterator[bool]:
    """Hold the lock under which a store's tables and experiments are created.

    A file whose creation was killed is removed first. A new file, or the study's own (`own`), gets write-ahead logging
    unless it lies on a network file system.

    Yields:
        Whether the database uses write-ahead logging.

    Raises:
        StudyError: another process holds the lock for minutes.
        OSError, sqlite3.Error: the file cannot be used.
    """
    database.parent.mkdir(parents=True, exist_ok=True)
    lock = database.with_name(database.name + ".lock")
    with _locked(lock):
        if lock.read_text() == _CREATING:  # half a schema cannot be completed
            for suffix in ("", "-wal", "-shm"):
                database.with_name(database.name + suffix).unlink(missing_ok=True)
        fresh = not database.exists()
        if fresh:
            lock.write_text(_CREATING)
        with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
            if (own or fresh) and not _on_network(database.parent):
                connection.execute("PRAGMA journal_mode=WAL")
            write_ahead = connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        yield write_ahead
        if fresh:
            lock.write_text("")


def skip_flushes(client: MlflowClient) -> None:
    """Let this process's commits not wait for the disk. Safe with write-ahead logging only."""
    from sqlalchemy import event

    # The engine is an inner part of MLflow's client; without it everything works, at half the speed.
    engine = getattr(getattr(getattr(client, "_tracking_client", None), "store", None), "engine", None)
    if engine is not None:
        engine.dispose()

        @event.listens_for(engine, "connect")
        def relax(connection: Any, _: object) -> None:
            connection.execute("PRAGMA synchronous=NORMAL")


@contextlib.contextmanager
def _locked(lock: Path, seconds: float = 180.0) -> Iterator[None]:
    """Hold a lock file; the lock ends with the process, however that ends."""
    with lock.open("a") as handle:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StudyError(
                        f"another process has been setting up the MLflow store for {seconds:.0f} s; "
                        f"end it, then run again (lock file {lock})"
                    ) from None
                time.sleep(0.05)
        yield


def _on_network(folder: Path) -> bool:
    """Whether a folder lies on a network file system, where SQLite's write-ahead logging is not safe."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return False
    holding = [(len(m[1]), m[2]) for m in mounts if folder.is_relative_to(m[1].replace("\\040", " "))]
    return max(holding, default=(0, ""))[1].startswith(_NETWORK)
