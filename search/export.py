"""A member of the front, written as an artifact."""

from __future__ import annotations

from pathlib import Path

from ..errors import StudyError
from ..objectives.objective import show
from ..runners.artifact import card, write
from .candidate import Candidate
from .front import Front


def export_candidate(front: Front, candidate: Candidate, to: Path) -> Path:
    """Write a candidate's artifact; raises `StudyError` when its packed file was not kept."""
    if front.directory is None or candidate.measurement is None:
        raise StudyError(f"candidate {candidate.number} has no file")
    path = front.directory / "candidates" / f"{candidate.recipe.key}.safetensors"
    if not path.exists():
        members = ", ".join(str(c.number) for c in front.members)
        raise StudyError(
            f"the file of candidate {candidate.number} was not kept, because others beat it; kept: {members}"
        )
    measurements = {
        "candidate": candidate.to_dict(),
        "baseline": front.baseline.to_dict(),
        "budget": [limit.text for limit in front.budget.limits],
        "over_budget": {limit: value for limit, value in candidate.excess.items() if value > 0},
    }
    name = f"{front.directory.name} #{candidate.number}"
    text = card(name, candidate.recipe, compared(front, candidate), machine(front))
    return write(to, path.read_bytes(), candidate.recipe, measurements, text)


def compared(front: Front, candidate: Candidate) -> list[tuple[str, str, str]]:
    """For people: each metric, its value for a measured candidate, and for the baseline."""
    rows = []
    for name, metric in candidate.measurement.metrics.items() if candidate.measurement else ():
        test = candidate.test.get(name)
        value = show(name, metric.value) + (
            f" (test: {show(name, test.value)})" if test and name not in ("size_bytes",) else ""
        )
        base = front.baseline.metrics.get(name)
        rows.append((name, value, show(name, base.value) if base else "-"))
    return rows


def machine(front: Front) -> str:
    """What the candidates were measured on."""
    return front.baseline.environment.get("processor", "this machine")
