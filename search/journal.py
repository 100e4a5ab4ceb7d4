"""The study's memory: one JSON line per finished trial, on disk before the next trial starts.

Optuna's own state is rebuilt from these lines, in memory, whenever a study is opened. That leaves one truth and no
trial that is forever RUNNING, costs one fsync per trial where Optuna's journal takes one per parameter, and a line that a
crash tore is simply cut off. (DESIGN.md proposes Optuna's JournalStorage; this does the same with less to repair.)
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import StudyError
from ..runners.files import write_atomic


class Journal:
    """`trials.jsonl` of a study's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All records; a last line without an end is a crash's and is cut off."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            write_atomic(self.path, whole)
        records = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise StudyError(f"{self.path}:{number} is damaged ({error}); restore the file from a backup, or move the "
                                 "study's folder away and start anew") from error  # fmt: skip
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Add a record and wait until it is on the disk; when that fails nothing of it is left."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self.path.open("ab") as stream:
            end = stream.tell()
            try:
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
            except OSError:
                os.truncate(self.path, end)
                raise


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a study's folder for this process alone; raises `StudyError` when another one holds it."""
    with (directory / ".lock").open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            raise StudyError(f"{directory} is in use by another search (process {stream.read().strip() or 'unknown'}); wait for its "
                             "end, stop it, or give this one another name or --output") from None  # fmt: skip
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield
