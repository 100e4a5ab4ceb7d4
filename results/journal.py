"""The journal of a study: one JSON line per finished trial, on disk before the next trial starts.

Optuna's own state is rebuilt in memory from these lines whenever a study is opened. The journal is therefore the only
source of truth, and no trial stays RUNNING forever. It costs one fsync per trial, where Optuna's `JournalStorage` needs
one per parameter. A last line that a crash left incomplete is cut off.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import StudyError
from ..runners.files.atomic import write_atomic


class Journal:
    """The file `trials.jsonl` of a study's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, *, mend: bool = False) -> list[dict[str, Any]]:
        """Read all records, without an incomplete last line.

        Args:
            mend: Also cut an incomplete last line off the file. Only for the process that writes the journal.

        Raises:
            StudyError: A complete line is not a record.
        """
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if mend and len(whole) < len(data):
            write_atomic(self.path, whole)
        records = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("a record is a JSON object")
            except ValueError as error:
                raise StudyError(
                    f"{self.path}:{number} is damaged ({error}); restore the file from a backup, or move the "
                    "study's folder away and start anew"
                ) from error
            records.append(record)
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Append a record and wait until it is on disk; on failure the file is left as it was."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        # Unbuffered: a buffer would write the rest of a failed record when the file is closed.
        with self.path.open("ab", buffering=0) as stream:
            end = stream.tell()
            try:
                while line:  # a disk that is nearly full accepts only part of the line
                    line = line[stream.write(line) :]
                os.fsync(stream.fileno())
            except BaseException:
                stream.truncate(end)
                raise


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lock a study's folder for this process.

    Raises:
        StudyError: Another process holds the lock.
        OSError: The folder cannot be locked.
    """
    path = directory / ".lock"
    while True:
        with path.open("a+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                raise StudyError(
                    f"{directory} is in use by another search (process {stream.read().strip() or 'unknown'}); "
                    "wait for its "
                    "end, stop it, or give this one another name or --output"
                ) from None
            if not _is_at(stream.fileno(), path):  # the process that held it removed the folder
                continue
            stream.truncate(0)
            stream.write(str(os.getpid()))
            stream.flush()
            yield
            return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def undisturbed() -> Iterator[None]:
    """Delay Ctrl-C (and SIGTERM, where a program handles it) to the end of the block; a second one is not delayed.

    An interruption inside the block would leave a database locked, or the disk different from the memory.
    """
    if threading.current_thread() is not threading.main_thread():  # signals arrive in the main thread only
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handled = {number: handler for number, handler in before.items() if callable(handler)}
    came: list[tuple[int, FrameType | None]] = []

    def restore() -> None:
        for number, handler in handled.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        came.append((number, frame))
        if len(came) > 1:
            restore()
            handled[signal.Signals(number)](number, frame)

    for number in handled:
        signal.signal(number, note)
    try:
        yield
    finally:
        restore()
    if came:
        handled[signal.Signals(came[0][0])](*came[0])
