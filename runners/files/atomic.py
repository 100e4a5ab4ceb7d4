"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a crash at any moment, of the machine too, leaves the old one or the new one.

    Raises:
        OSError: The file cannot be written; an older one stays as it was.
    """
    _replace(path, data, durable=True)


def write_whole(path: Path, data: bytes | str) -> None:
    """Like `write_atomic`, but the folder is made and the disk is not waited for: for files that can be made again.

    A kill of the process leaves the old file or the new one. After a power cut the file may be empty.

    Raises:
        OSError: The file cannot be written; an older one stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, data, durable=False)


def _replace(path: Path, data: bytes | str, durable: bool) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_parts(folder: Path) -> None:
    """Remove what a kill in the middle of writing has left anywhere in a folder."""
    for pattern in (".*.partial", ".*.part"):  # the second is the name that older versions wrote
        for path in folder.rglob(pattern):
            if not path.is_dir():
                path.unlink(missing_ok=True)


def write_scores(path: Path, scores: NDArray[np.float64]) -> None:
    """Keep a score per sample: a byte each where all are 0 or 1, else four."""
    buffer = io.BytesIO()
    binary = bool(((scores == 0) | (scores == 1)).all())
    np.save(buffer, scores.astype(np.uint8 if binary else np.float32), allow_pickle=False)
    write_atomic(path, buffer.getvalue())


def read_scores(path: Path) -> NDArray[np.floating] | None:
    """What `write_scores` has written, if that is still there and readable."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.ndim == 1 else None
