"""Removal of the files of candidates that a study no longer needs."""

from __future__ import annotations

from ..results.front import Front
from ..runners.files.candidates import OWNED_FILES, PARTIAL_TRAINING, CandidateFiles
from ..spaces.recipe import Recipe
from .ensembles import eligible
from .history import History
from .promotion import Promotions


def keep_files(
    files: CandidateFiles,
    front: Front,
    history: History,
    promotions: Promotions,
    *,
    combines: bool,
    interrupted: bool = False,
) -> None:
    """Remove the files that are no longer needed.

    Packed files are kept for the front, the nearest misses, the reference recipes, and candidates that ensembles may
    contain. Scores are kept for the front and for the best of each rung, which later candidates are compared with.
    Trained weights are kept for candidates that may be promoted. After an interruption, partially trained weights are
    kept until the end of the next trial, because that trial is the interrupted one.

    Args:
        files: The candidates' files.
        front: The front so far.
        history: All candidates.
        promotions: The rungs.
        combines: Whether ensembles are tried after the trials.
        interrupted: Whether the study was just resumed.
    """
    keys, candidates = history.keys, history.candidates
    packed = [*front.members, *front.least_violating(3), *(c for c in front.candidates if c.label)]
    if combines:
        packed += eligible(front)
    wanted = {files.packed(keys[c.number]).name for c in packed}
    wanted |= {files.scores(Recipe()).name, *(files.scores(keys[c.number]).name for c in front.members)}
    for rung in range(len(promotions.ladder.rungs)):
        wanted |= {files.scores(candidates[entry.number].recipe).name for entry in promotions.best(rung)}
    students = [s for s in promotions.space.students if s and s.epochs]
    wanted |= {files.trained(Recipe((student,))).name for student in students}
    wanted |= {files.trained(candidates[number].recipe).name for number in promotions.likely()}
    for path in files.directory.iterdir():
        if interrupted and path.suffix == PARTIAL_TRAINING:
            continue
        if OWNED_FILES.fullmatch(path.name) and path.name not in wanted:
            path.unlink(missing_ok=True)
