"""The candidates of a study in memory, by number and by recipe: plain data that the parts of a study share."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from ..results.candidate import Candidate
from ..spaces.techniques.ensemble import Ensemble


@dataclass
class History:
    """The candidates of a study so far.

    Args:
        candidates: All candidates, in the order of their numbers.
        by_key: The candidate for each recipe key.
        keys: The recipe key for each number, cached because hashing a recipe of many steps is slow.
        records: The number of lines in the journal, including repeated suggestions.
        ensembles: How many of the candidates are ensembles.
    """

    candidates: list[Candidate] = field(default_factory=list)
    by_key: dict[str, Candidate] = field(default_factory=dict)
    keys: dict[int, str] = field(default_factory=dict)
    records: int = 0
    ensembles: int = 0

    def add(self, candidate: Candidate) -> None:
        self.candidates.append(candidate)
        self.keys[candidate.number] = key = candidate.recipe.key
        self.by_key[key] = candidate
        self.ensembles += bool(candidate.recipe.of(Ensemble))

    @property
    def trials(self) -> int:
        """The number of trials; ensembles of their candidates do not count."""
        return len(self.candidates) - self.ensembles

    @property
    def ensembles_since_the_last_trial(self) -> int:
        return sum(1 for _ in itertools.takewhile(lambda c: c.recipe.of(Ensemble), reversed(self.candidates)))
