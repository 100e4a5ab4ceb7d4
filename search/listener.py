"""Whoever follows a study hears of it in plain data, never of the study itself."""

from __future__ import annotations

from typing import Protocol

from ..results.candidate import Candidate
from ..results.front import Front
from .preflight import Preflight


class Listener(Protocol):
    """Whoever wants to follow a study."""

    def say(self, text: str) -> None:
        """A line worth keeping."""

    def phase(self, text: str) -> None:
        """What is being done at the moment."""

    def checked(self, preflight: Preflight) -> None:
        """The preflight is through."""

    def finished(self, candidate: Candidate, front: Front, done: int, total: int, eta: float) -> None:
        """A trial ended; `eta` is in seconds."""


class Quiet:
    """A listener that does not listen."""

    def say(self, text: str) -> None: ...

    def phase(self, text: str) -> None: ...

    def checked(self, preflight: Preflight) -> None: ...

    def finished(self, candidate: Candidate, front: Front, done: int, total: int, eta: float) -> None: ...
