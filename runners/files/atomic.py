"""Atomic writing: a file is written under another name in the same folder, then renamed."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a crash at any moment, even of the machine, leaves the old one or the new one.

    Raises:
        OSError: The file cannot be written; an older one stays as it was.
    """
    _replace(path, data, durable=True)


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file that can be made again; faster than `write_atomic`, because it does not wait for the disk.

    The folder is created if it is missing. When the process is killed, the old file or the new one is left. After a
    power failure the file may be empty.

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
    """Remove the partial files that a killed process has left anywhere in a folder."""
    for pattern in (".*.partial", ".*.part"):  # the second is the name that older versions wrote
        for path in folder.rglob(pattern):
            if not path.is_dir():
                path.unlink(missing_ok=True)


def write_scores(path: Path, scores: NDArray[np.float64]) -> None:
    """Write a score per sample, as a byte each where all are 0 or 1, else as four."""
    buffer = io.BytesIO()
    binary = bool(((scores == 0) | (scores == 1)).all())
    np.save(buffer, scores.astype(np.uint8 if binary else np.float32), allow_pickle=False)
    write_atomic(path, buffer.getvalue())


def read_scores(path: Path) -> NDArray[np.floating] | None:
    """Read what `write_scores` has written; None where the file is missing or damaged."""
    try:
        scores: NDArray[np.floating] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return scores if scores.ndim == 1 else None
