"""How work says what it is doing: one kind of listener for building, training and every request."""

from __future__ import annotations

from collections.abc import Callable

# Called with a description of what is being done.
Progress = Callable[[str], None]


def silent(phase: str) -> None:
    """A `Progress` that does nothing."""
