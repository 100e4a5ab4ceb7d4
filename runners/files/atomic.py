"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one; raises `OSError`."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


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
