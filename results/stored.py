"""The candidates of a study on disk: its journal, combined with the numbers of the finalists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..objectives.measurement import Estimate
from ..objectives.objective import COSTS
from .candidate import Candidate
from .folder import BASELINE, StudyFolder
from .journal import Journal

Finalists = Mapping[str, Mapping[str, Estimate]]


def read_candidates(folder: StudyFolder) -> tuple[list[Candidate], Estimate | None]:
    """Read all candidates, with their numbers as finalists, and the baseline's metric on the test split."""
    records = Journal(folder.journal).read()
    candidates = [Candidate.from_dict(record["candidate"]) for record in records if "candidate" in record]
    finalists = folder.read_finalists()
    return with_tests(candidates, finalists), tested_baseline(finalists)


def with_tests(candidates: Sequence[Candidate], finalists: Finalists) -> list[Candidate]:
    """The candidates with their numbers as finalists filled in."""
    return [replace(c, test=dict(finalists.get(c.recipe.key, {}))) for c in candidates]


def tested_baseline(finalists: Finalists) -> Estimate | None:
    """The baseline's metric on the test split; None where it was not measured."""
    return next((e for name, e in finalists.get(BASELINE, {}).items() if name not in COSTS), None)
