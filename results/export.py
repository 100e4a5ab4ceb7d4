"""Export of a candidate as an artifact. All it needs is the candidate and the study's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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

UNASKED_SHARE = 0.2  # of the usual time is spent on a latency that no objective and no limit uses


def export_candidate(
    folder: StudyFolder, candidate: Candidate, to: Path, *, force: bool = False, kept: str = ""
) -> Path:
    """Write the artifact of a candidate.

    Args:
        folder: The study's folder.
        candidate: A measured candidate.
        to: The directory to write; an older artifact there is replaced.
        force: Write it even if its file does not compute what was simulated.
        kept: The numbers of candidates whose files were kept, for the message when this one's was not.

    Returns:
        The directory.

    Raises:
        StudyError: The packed file was not kept, or it does not compute what was simulated.
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
    """The numbers of a measured candidate and the settings they were measured with.

    Raises:
        StudyError: The candidate was never measured, or `study.json` does not say how the study measures.
    """
    if candidate.measurement is None:
        raise StudyError(f"candidate {candidate.number} was never measured")
    stored = folder.read_about()
    settings, task = settings_of(folder, stored)
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


def settings_of(folder: StudyFolder, stored: Mapping[str, Any]) -> tuple[MeasurementSettings, str]:
    """The measurement settings of a study on disk, and the name of its task; `stored` is its `study.json`.

    Raises:
        StudyError: `study.json` does not hold them.
    """
    try:
        asked = stored["snapshot"]
        return MeasurementSettings(**asked["measure"], seed=asked["seed"]), str(asked["task"])
    except (KeyError, TypeError) as error:
        raise StudyError(f"{folder.about} does not say how was measured: {error!r}") from error


def recorded_in(study: Path, recipe: Recipe) -> Record:
    """The numbers that a study measured for a recipe.

    Raises:
        StudyError: The study did not measure it.
    """
    folder = StudyFolder(study.absolute())
    folder.read_about()
    for candidate in read_candidates(folder)[0]:
        if candidate.recipe == recipe and candidate.measurement is not None:
            return record_of(folder, candidate)
    raise StudyError(
        f"the study in {study} has not measured this recipe ({recipe.describe()}); name the study or the artifact "
        "that it comes from"
    )
