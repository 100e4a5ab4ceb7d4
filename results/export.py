"""A member of the front, written as an artifact. Takes the candidate and the study's folder, which knows all the
rest.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import StudyError
from ..objectives.measurement import Measurement
from ..objectives.objective import Budget, Objective
from ..runners.artifact import card, write
from ..runners.record import Record, rows
from ..runners.settings import MeasurementSettings
from ..spaces.recipe import Recipe
from .candidate import Candidate
from .folder import StudyFolder
from .parity import check_parity
from .stored import read_candidates, tested_baseline

UNASKED_SHARE = 0.2  # of the usual time is spent on a latency that no objective and no limit asks for


def export_candidate(
    folder: StudyFolder, candidate: Candidate, to: Path, *, force: bool = False, kept: str = ""
) -> Path:
    """Write a candidate's artifact.

    Args:
        folder: The study's.
        candidate: A measured candidate.
        to: The directory to write; an older artifact there is replaced.
        force: Write it although its file does not compute what was simulated.
        kept: Numbers of candidates whose files were kept, for the message where this one's was not.

    Raises:
        StudyError: Its packed file was not kept, or does not compute what was simulated.
    """
    if not force:
        check_parity(candidate)
    if candidate.measurement is None:
        raise StudyError(f"candidate {candidate.number} has no file")
    path = folder.candidates.packed(candidate.recipe)
    if not path.exists():
        raise StudyError(f"the file of candidate {candidate.number} was not kept, because others beat it; kept: {kept}")
    record, environment = record_of(folder, candidate), candidate.measurement.environment
    text = card(candidate.recipe, record, environment)
    return write(to, path.read_bytes(), candidate.recipe, record.to_dict(), text, environment)


def record_of(folder: StudyFolder, candidate: Candidate) -> Record:
    """What a study knows of a measured candidate, and how it was measured; raises `StudyError`."""
    if candidate.measurement is None:
        raise StudyError(f"candidate {candidate.number} was never measured")
    settings, task = settings_of(folder)
    stored = folder.read_about()
    objectives = [Objective(**entry) for entry in stored["objectives"]]
    budget = Budget.parse(stored["snapshot"]["budget"])
    baseline = Measurement.from_dict(stored["baseline"])
    wanted = {o.metric for o in objectives} | {limit.metric for limit in budget.limits}
    return Record(
        name=f"{folder.root.name} #{candidate.number}",
        task=task,
        rows=rows(
            candidate.measurement,
            baseline,
            settings,
            test=candidate.test,
            test_base=tested_baseline(folder.read_finalists()),
            box=settings.seconds * (1 if "latency_ms" in wanted else UNASKED_SHARE),
        ),
        protocol=settings,
        budget=tuple(limit.text for limit in budget.limits),
        over_budget={limit: value for limit, value in candidate.excess.items() if value > 0},
    )


def settings_of(folder: StudyFolder) -> tuple[MeasurementSettings, str]:
    """How a study on disk measures, and the name of its task; raises `StudyError` when it does not say so."""
    try:
        asked = folder.read_about()["snapshot"]
        return MeasurementSettings(**asked["measure"], seed=asked["seed"]), str(asked["task"])
    except (KeyError, TypeError) as error:
        raise StudyError(f"{folder.about} does not say how was measured: {error!r}") from error


def recorded_in(study: Path, recipe: Recipe) -> Record:
    """What a study measured for this recipe; raises `StudyError` when it did not."""
    folder = StudyFolder(study.absolute())
    folder.read_about()
    for candidate in read_candidates(folder)[0]:
        if candidate.recipe == recipe and candidate.measurement is not None:
            return record_of(folder, candidate)
    raise StudyError(
        f"the study in {study} has not measured this recipe ({recipe.describe()}); name the study or the artifact "
        "that it comes from"
    )
