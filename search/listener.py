"""The interface for following a study. A listener receives plain data, never the study itself."""

from __future__ import annotations

from typing import Protocol

from ..results.candidate import Candidate
from ..results.front import Front
from .preflight import Preflight


class Listener(Protocol):
    """Follows the progress of a study."""

    def say(self, text: str) -> None:
        """Called with a line of text that should remain visible."""

    def phase(self, text: str) -> None:
        """Called with a description of the current activity."""

    def checked(self, preflight: Preflight) -> None:
        """Called when the preflight has succeeded."""

    def finished(self, candidate: Candidate, front: Front, done: int, total: int, eta: float) -> None:
        """Called when a trial has ended.

        Args:
            candidate: The candidate.
            front: The front including it.
            done: The number of finished trials.
            total: The expected number of trials.
            eta: The expected seconds to the end of the study.
        """


class Quiet:
    """A listener that ignores everything."""

    def say(self, text: str) -> None: ...

    def phase(self, text: str) -> None: ...

    def checked(self, preflight: Preflight) -> None: ...

    def finished(self, candidate: Candidate, front: Front, done: int, total: int, eta: float) -> None: ...
