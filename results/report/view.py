"""The content of a report as plain data, computed once by `view_of`.

The writers in this folder read only a `View` (the plots also `results.report.plots.Plots`), so every number, verdict
and sentence is the same in the terminal, in `report.md` and on the page. Every measured number has its 95% interval,
and a difference within the intervals is not reported as one.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...objectives.measurement import Estimate, Measurement
from ...objectives.objective import Objective
from ..candidate import FAILED, OVER_BUDGET, Candidate
from ..certainty import describe_clusters, describe_optimism
from ..front import Front
from . import sentences
from .cells import Cell, beside, costs_of, difference, final, heading, is_trivial, measured
from .misses import misses, nearest

NEAREST = 3  # how many candidates over the budget are shown where the front is empty


@dataclass(frozen=True)
class MemberView:
    """A member of the front.

    Args:
        candidate: The candidate.
        what: Its recipe in one line.
        numbers: Its numbers by metric; the latency of a finalist is the one from the clean process.
        test: Its metric on the test split, with the paired difference to the baseline there, `-0.56 ±1.20`.
        marks: See `results.report.sentences.marks`.
        verdicts: See `Front.verdicts`.
    """

    candidate: Candidate
    what: str
    numbers: Mapping[str, Cell]
    test: Cell
    marks: tuple[str, ...]
    verdicts: Mapping[str, object]


@dataclass(frozen=True)
class NearMiss:
    """A candidate over the budget: by how much it misses each limit, and the limits it would keep."""

    number: int
    what: str
    quality: Cell
    misses: tuple[str, ...]
    keeps: tuple[str, ...]


@dataclass(frozen=True)
class TrivialView:
    """A reference recipe, such as all weights at 8 bits, and what the search improves on it."""

    number: int
    label: str
    numbers: Mapping[str, Cell]
    verdict: str


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of the candidates.

    Args:
        states: How many candidates are in each state.
        over: How many are over the budget.
        rejected: How many of these were never measured, because their predicted cost exceeds a limit.
        exceeded: For each limit, how many candidates exceed it.
        exceeded_by_over: The same among the candidates over the budget. A candidate that was stopped early counts in
            `exceeded` only.
        failed: Number and reason of each failed candidate.
    """

    states: Mapping[str, int]
    over: int
    rejected: int
    exceeded: tuple[tuple[str, int], ...]
    exceeded_by_over: tuple[tuple[str, int], ...]
    failed: tuple[tuple[int, str], ...]

    @property
    def total(self) -> int:
        return sum(self.states.values())


@dataclass(frozen=True)
class BoundLimit:
    """A limit of the budget, with its absolute value for this baseline."""

    text: str
    metric: str
    upper: bool
    value: float


@dataclass(frozen=True)
class View:
    """A front and everything a report says about it.

    Args:
        name: The study's name.
        config: The study's configuration as YAML; empty where there is none.
        notes: Further remarks in Markdown.
        study: The study's folder as one types it in a shell.
        objectives: The objectives.
        limits: The limits with their absolute values.
        budget: The limits, for people.
        quality: The name of the quality metric.
        costs: The names of the costs.
        columns: The metrics in the report's table of the front.
        baseline: The measurement of the original model.
        test_baseline: Its metric on the test split; None where it was not measured.
        members: The members of the front.
        knee: The knee; None where the front is empty.
        recommended: The recommended member; None where the front is empty.
        pick: The candidate to export by default, as `--pick` takes it.
        nearest: The candidates that miss the budget by the least.
        trivial: The reference recipes.
        trivial_volume: The hypervolume of the reference recipes alone.
        hypervolume: The hypervolume of the front.
        outcomes: The outcomes of all candidates.
        summary: See `results.report.sentences.summary`.
        certainty: See `results.report.sentences.certainty`.
        warnings: See `results.report.sentences.warnings`.
        clusters: Lines on members that cannot be distinguished.
        optimism: A sentence on the bias of the selection.
        sensitivity: The heat map in the study's folder; None where it was not measured.
    """

    name: str
    config: str
    notes: tuple[str, ...]
    study: str
    objectives: tuple[Objective, ...]
    limits: tuple[BoundLimit, ...]
    budget: tuple[str, ...]
    quality: str
    costs: tuple[str, ...]
    columns: tuple[str, ...]
    baseline: Measurement
    test_baseline: Estimate | None
    members: tuple[MemberView, ...]
    knee: Candidate | None
    recommended: Candidate | None
    pick: str
    nearest: tuple[NearMiss, ...]
    trivial: tuple[TrivialView, ...]
    trivial_volume: float
    hypervolume: float
    outcomes: Outcomes
    summary: str
    certainty: tuple[str, ...]
    warnings: tuple[str, ...]
    clusters: tuple[str, ...]
    optimism: str
    sensitivity: Path | None

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metric and the costs."""
        return (self.quality, *self.costs)

    @property
    def tested(self) -> bool:
        """Whether a member was measured on the test split."""
        return any(self.quality in member.candidate.test for member in self.members)

    def baseline_cell(self, metric: str) -> Cell:
        """The baseline's number."""
        return Cell.of(metric, self.baseline.metrics.get(metric))

    @property
    def test_baseline_cell(self) -> Cell:
        """The baseline's metric on the test split."""
        return Cell.of(self.quality, self.test_baseline)


def view_of(
    front: Front,
    *,
    name: str = "",
    config_text: str = "",
    budget_lines: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> View:
    """Compute everything a report says about a front; the arguments are those of `write_report`."""
    costs = costs_of(front)
    columns = [metric for metric in (front.quality, *costs) if metric in front.baseline.metrics]
    if "zstd_bytes" in front.baseline.metrics:
        columns.insert(columns.index("size_bytes") + 1 if "size_bytes" in columns else len(columns), "zstd_bytes")
    baseline = {metric: estimate.value for metric, estimate in front.baseline.metrics.items()}
    limits = [BoundLimit(x.text, x.metric, x.upper, x.resolve(baseline[x.metric])) for x in front.budget.limits]
    trivial = tuple(c for c in front.candidates if is_trivial(c))
    picture = front.directory / "sensitivity.png" if front.directory else None
    outcomes, clusters, warnings = (
        _outcomes(front),
        tuple(describe_clusters(front.clusters, front.quality)),
        sentences.warnings(front),
    )
    return View(
        name=name,
        config=config_text,
        notes=tuple(notes),
        study=_typed(front.directory),
        objectives=front.objectives,
        limits=tuple(limits),
        budget=tuple(budget_lines) or tuple(front.budget.describe(baseline)),
        quality=front.quality,
        costs=tuple(costs),
        columns=tuple(columns),
        baseline=front.baseline,
        test_baseline=front.test_baseline,
        members=tuple(_member(front, member, (front.quality, *costs, *columns)) for member in front.members),
        knee=front.knee() if front.members else None,
        recommended=front.recommended() if front.members else None,
        pick=sentences.pick(front),
        nearest=tuple(_near_miss(front, candidate) for candidate in nearest(front, NEAREST)),
        trivial=tuple(_trivial(front, candidate, (front.quality, *costs)) for candidate in trivial),
        trivial_volume=replace(front, candidates=trivial).hypervolume(),
        hypervolume=front.hypervolume(),
        outcomes=outcomes,
        summary=sentences.summary(front, costs, outcomes.states),
        certainty=sentences.certainty(front, clusters, warnings),
        warnings=warnings,
        clusters=clusters,
        optimism=describe_optimism(front.optimism(), front.quality),
        sensitivity=picture if picture and picture.is_file() else None,
    )


def front_cells(view: View) -> tuple[list[str], list[list[Cell]]]:
    """Headings and cells of the front's table, for the Markdown report and the page."""
    tests = [f"test {view.quality}"] if view.tested else []
    heads = ["#", *(heading(name) for name in view.columns), *tests, "what"]
    lines = []
    for member in view.members:
        line = [Cell(str(member.candidate.number)), *(member.numbers[name] for name in view.columns)]
        if view.tested:
            test = member.test
            compared = f"{test.beside} against the baseline" if test.beside else ""
            line.append(Cell(test.value, test.interval, beside=compared))
        remarks = ", ".join(text for text in (member.candidate.label, *member.marks) if text)
        lines.append([*line, Cell(member.what + (f" ({remarks})" if remarks else ""))])
    return heads, lines


def _typed(directory: Path | None) -> str:
    """The study's folder as one types it in the current directory."""
    if directory is None:
        return "STUDY"
    path = directory.resolve()
    short = os.path.relpath(path)
    return shlex.quote(str(path) if short.startswith("..") else short)


def _member(front: Front, member: Candidate, metrics: Sequence[str]) -> MemberView:
    return MemberView(
        candidate=member,
        what=member.recipe.describe(),
        numbers={name: Cell.of(name, final(member, name), beside(front, member, name)) for name in metrics},
        test=Cell.of(front.quality, member.test.get(front.quality), difference(front, member)),
        marks=sentences.marks(front, member),
        verdicts=front.verdicts(member),
    )


def _near_miss(front: Front, candidate: Candidate) -> NearMiss:
    pairs = misses(front, candidate)
    return NearMiss(
        candidate.number,
        candidate.recipe.describe(),
        Cell.of(front.quality, measured(candidate, front.quality)),
        tuple(missed for missed, _ in pairs),
        tuple(kept for _, kept in pairs),
    )


def _trivial(front: Front, candidate: Candidate, metrics: Sequence[str]) -> TrivialView:
    numbers = {name: Cell.of(name, measured(candidate, name)) for name in metrics}
    return TrivialView(candidate.number, candidate.label, numbers, sentences.beaten(front, candidate))


def _outcomes(front: Front) -> Outcomes:
    over = [c for c in front.candidates if c.state == OVER_BUDGET]
    return Outcomes(
        states=Counter(c.state for c in front.candidates),
        over=len(over),
        rejected=sum(c.measurement is None for c in over),
        exceeded=_exceeded(front.candidates),
        exceeded_by_over=_exceeded(over),
        failed=tuple((c.number, c.reason) for c in front.candidates if c.state == FAILED),
    )


def _exceeded(candidates: Sequence[Candidate]) -> tuple[tuple[str, int], ...]:
    """How many candidates exceed each limit, the one most often exceeded first."""
    return tuple(Counter(text for c in candidates for text, value in c.excess.items() if value > 0).most_common())
