"""A member of the front, written as an artifact."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import StudyError
from ..objectives.display import show, spread
from ..runners.artifact import card, write
from ..runners.record import MeasurementProtocol, Record, rows
from ..search.finalists import check_parity
from ..search.study import UNTIMED, open_front
from ..spaces.recipe import Recipe
from .candidate import Candidate
from .front import Front


def export_candidate(front: Front, candidate: Candidate, to: Path, force: bool = False) -> Path:
    """Write a candidate's artifact.

    Raises `StudyError` when its packed file was not kept, or does not compute what was simulated, unless `force`.
    """
    if not force:
        check_parity(candidate)
    if front.directory is None or candidate.measurement is None:
        raise StudyError(f"candidate {candidate.number} has no file")
    path = front.directory / "candidates" / f"{candidate.recipe.key}.safetensors"
    if not path.exists():
        members = ", ".join(str(c.number) for c in front.members)
        raise StudyError(
            f"the file of candidate {candidate.number} was not kept, because others beat it; kept: {members}"
        )
    record, environment = record_of(front, candidate), candidate.measurement.environment
    text = card(candidate.recipe, record, environment)
    return write(to, path.read_bytes(), candidate.recipe, record.to_dict(), text, environment)


def record_of(front: Front, candidate: Candidate) -> Record:
    """What a study knows of a measured candidate, and how it was measured; raises `StudyError`."""
    if front.directory is None or candidate.measurement is None:
        raise StudyError(f"candidate {candidate.number} was never measured")
    protocol, task = asked_of(front)
    wanted = {o.metric for o in front.objectives} | {limit.metric for limit in front.budget.limits}
    return Record(
        name=f"{front.directory.name} #{candidate.number}",
        task=task,
        rows=rows(
            candidate.measurement,
            front.baseline,
            protocol,
            test=candidate.test,
            test_base=front.test_baseline,
            box=protocol.seconds * (1 if "latency_ms" in wanted else UNTIMED),
        ),
        protocol=protocol,
        budget=tuple(limit.text for limit in front.budget.limits),
        over_budget={limit: value for limit, value in candidate.excess.items() if value > 0},
    )


def asked_of(front: Front) -> tuple[MeasurementProtocol, str]:
    """How a study on disk measures, and the name of its task; raises `StudyError` when it does not say so."""
    assert front.directory is not None
    path = front.directory / "study.json"
    try:
        asked = json.loads(path.read_text())["snapshot"]
        return MeasurementProtocol(**asked["measure"], seed=asked["seed"]), str(asked["task"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{path} does not say how was measured: {error!r}") from error


def recorded_in(study: Path, recipe: Recipe) -> Record:
    """What a study measured for this recipe; raises `StudyError` when it did not."""
    front = open_front(study)
    for candidate in front.candidates:
        if candidate.recipe == recipe and candidate.measurement is not None:
            return record_of(front, candidate)
    raise StudyError(f"the study in {study} has not measured this recipe ({recipe.describe()}); name the study or the artifact "
                     "that it comes from")  # fmt: skip


def compared(front: Front, candidate: Candidate) -> list[tuple[str, str, str]]:
    """For people: each metric, its value for a measured candidate, and for the baseline."""
    rows = []
    for name, metric in candidate.measurement.metrics.items() if candidate.measurement else ():
        test = candidate.test.get(name)
        value = show(name, metric.value) + (
            f" (test: {show(name, test.value)})" if test and name not in ("size_bytes",) else ""
        )
        if (paired := candidate.test.get(f"{name}_difference")) is not None:
            kind = f"{name}_difference"
            value += f", {show(kind, paired.value)} {spread(kind, paired)} against the baseline there"
        base = front.baseline.metrics.get(name)
        rows.append((name, value, show(name, base.value) if base else "-"))
    return rows


def machine(front: Front) -> str:
    """What the candidates were measured on."""
    return front.baseline.environment.get("processor", "this machine")
