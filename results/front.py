"""The front: the candidates inside the budget that no other dominates, and how to choose among them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, StudyError
from ..objectives.display import show, speed, spread
from ..objectives.measurement import Estimate, Measurement, flat
from ..objectives.objective import COSTS, Budget, Objective
from ..objectives.pareto import hypervolume, knee, nondominated
from ..spaces.recipe import Recipe
from .candidate import OK, OVER_BUDGET, STOPPED, Candidate
from .certainty import clusters, optimism
from .folder import BASELINE, StudyFolder
from .parity import parity_failure
from .stored import read_candidates

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Front:
    """All candidates of a study, and the nondominated ones among them (`members`).

    Args:
        candidates: All candidates, in the order of their numbers.
        objectives: What the study optimizes; the first one decides in `select` under limits.
        budget: The limits that every member keeps.
        baseline: The measurement of the original model.
        directory: The study's folder; None where there is none.
        test_baseline: The baseline's metric on the test split; None where it was not measured.
    """

    candidates: tuple[Candidate, ...]
    objectives: tuple[Objective, ...]
    budget: Budget
    baseline: Measurement
    directory: Path | None = None
    test_baseline: Estimate | None = None

    def losses(self, candidate: Candidate) -> list[float]:
        """The objectives as numbers to minimize, relative to the baseline."""
        if candidate.measurement is None:
            raise StudyError(f"candidate {candidate.number} was never measured ({candidate.reason})")
        return [o.loss(candidate.measurement.value(o.metric), self.baseline.value(o.metric)) for o in self.objectives]

    @cached_property
    def members(self) -> tuple[Candidate, ...]:
        """The nondominated candidates inside the budget, the smallest first; of equal ones only the first."""
        ok = self._inside()
        points = [tuple(self.losses(c)) for c in ok]
        first: dict[tuple[float, ...], Candidate] = {}
        for candidate, point, kept in zip(ok, points, nondominated(points), strict=True):
            if kept:
                first.setdefault(point, candidate)
        best = first.values()
        return tuple(sorted(best, key=_by_size))

    def _inside(self) -> list[Candidate]:
        return [c for c in self.candidates if c.state == OK and c.measurement is not None]

    @property
    def quality(self) -> str:
        """The metric that is not a cost: the first such objective, or else the first such metric of the baseline."""
        names = [o.metric for o in self.objectives] + [m for m in self.baseline.metrics if not m.endswith("_bytes")]
        return next((name for name in names if name not in COSTS), self.objectives[0].metric)

    def maximizes(self, metric: str) -> bool:
        """Whether more of a metric is better."""
        return next((o.maximize for o in self.objectives if o.metric == metric), metric not in COSTS)

    def latency(self, candidate: Candidate) -> tuple[Estimate, Estimate] | None:
        """The latency of a candidate and of the baseline, for a comparison; None where it was not measured.

        For a finalist, the ratio to the baseline that a clean process measured, and 1.
        """
        if (ratio := candidate.test.get("latency_ratio")) is not None:
            return ratio, Estimate.exact(1.0)
        latency = candidate.measurement.metrics.get("latency_ms") if candidate.measurement else None
        base = self.baseline.metrics.get("latency_ms")
        return None if latency is None or base is None else (latency, base)

    def speed(self, candidate: Candidate) -> str:
        """The verdict by the 95% intervals: `faster`, `same speed` or `slower`; empty without a latency."""
        pair = self.latency(candidate)
        return speed(*pair) if pair else ""

    @property
    def folder(self) -> StudyFolder | None:
        """The study's folder; None for a front without one."""
        return None if self.directory is None else StudyFolder(self.directory)

    @cached_property
    def clusters(self) -> dict[int, int]:
        """Members that the test split cannot distinguish; see `results.certainty.clusters`."""
        folder = self.folder
        scores = {
            m.number: each
            for m in self.members
            if folder is not None and (each := folder.read_finalist_scores(m.recipe.key)) is not None
        }
        costs = [o.metric for o in self.objectives if o.metric in COSTS]
        return clusters(self.members, scores, costs, self.maximizes(self.quality))

    def optimism(self) -> Estimate | None:
        """The bias of the selection on the validation split; see `results.certainty.optimism`."""
        name, folder = self.quality, self.folder
        measured = [(m, m.measurement) for m in self.members if m.measurement and name in m.measurement.metrics]
        tested = [(member, measurement) for member, measurement in measured if name in member.test]
        if not tested or self.test_baseline is None or name not in self.baseline.metrics:
            return None
        sign = 1.0 if self.maximizes(name) else -1.0
        usual = self.baseline.value(name) - self.test_baseline.value
        losses = [sign * (on_validation.value(name) - m.test[name].value - usual) for m, on_validation in tested]
        if folder is None:
            return optimism(losses, (), ())
        keys = [m.recipe.key for m, _ in tested]
        validation = [folder.candidates.read_scores(key) for key in (Recipe().key, *keys)]
        return optimism(losses, validation, [folder.read_finalist_scores(key) for key in (BASELINE, *keys)])

    def knee(self) -> Candidate:
        """The member farthest below the plane through the front's extremes (Das 1999)."""
        return self._knee(self.members)

    def _knee(self, members: tuple[Candidate, ...]) -> Candidate:
        return self._chosen(members)[knee([self.losses(c) for c in members])]

    def recommended(self) -> Candidate:
        """The knee, or the cheapest member that the test split cannot distinguish from it.

        Members whose file does not compute what was simulated are skipped, unless that is all of them.
        """
        verified = tuple(m for m in self.members if not parity_failure(m))
        knee = self._knee(verified or self.members)
        number = self.clusters.get(knee.number, knee.number)
        return next(m for m in self.members if m.number == number)

    def best(self, metric: str) -> Candidate:
        """The member with the best value of one objective."""
        objective = next((o for o in self.objectives if o.metric == metric), None)
        if objective is None:
            raise ConfigError(
                f"{metric!r} is not an objective here; choose from {', '.join(o.metric for o in self.objectives)}"
            )
        return min(self._chosen(self.members), key=lambda c: self.losses(c)[self.objectives.index(objective)])

    def select(self, pick: str) -> Candidate:
        """Select one candidate.

        Args:
            pick: `knee`; `recommended`; a candidate's number; the name of an objective, for the best member in it; or
                limits joined by `and` such as `size_bytes <= 80kB`, for the member that keeps them and is best in
                the first objective.

        Raises:
            ConfigError: The text is none of these, or no candidate fits it.
        """
        text = pick.strip()
        if text == "knee":
            return self.knee()
        if text == "recommended":
            return self.recommended()
        if text.isdecimal():
            candidate = next((c for c in self.candidates if c.number == int(text)), None)
            if candidate is None or candidate.measurement is None or candidate.state == STOPPED:
                missing = f"there is no candidate {text}"
                why = f"candidate {text} has no file ({candidate.reason})" if candidate else missing
                raise ConfigError(f"--pick {pick}: {why}; the front has {_numbers(self.members)}")
            return candidate
        if text in [o.metric for o in self.objectives]:
            return self.best(text)
        if "<=" in text or ">=" in text:
            limits = Budget.parse(text.split(" and "))
            if unknown := [limit.metric for limit in limits.limits if limit.metric not in self.baseline.metrics]:
                raise ConfigError(
                    f"--pick {pick!r}: unknown metric {', '.join(map(repr, unknown))}; metrics: "
                    f"{', '.join(self.baseline.metrics)}"
                )
            inside = [c for c in self._chosen(self.members) if self._keeps(limits, c)]
            if not inside:
                raise ConfigError(
                    f"--pick {pick!r}: no member of the front keeps it; members: {_numbers(self.members)}"
                )
            return min(inside, key=lambda c: self.losses(c)[0])
        close = difflib.get_close_matches(text, ["knee", "recommended", *(o.metric for o in self.objectives)], 1)
        raise ConfigError(
            f"--pick {pick!r}: write knee, recommended, a candidate's number, an objective "
            f"({', '.join(o.metric for o in self.objectives)}) "
            f"or a limit such as 'size_bytes <= 80kB'{f'; did you mean {close[0]}?' if close else ''}"
        )

    def _keeps(self, limits: Budget, candidate: Candidate) -> bool:
        assert candidate.measurement is not None
        excess = limits.excess(candidate.measurement.values, self.baseline.values)
        return all(share <= 0 for share in excess.values())

    def _chosen(self, members: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        if not members:
            raise StudyError(
                "the front is empty: no candidate kept the budget; see the least-violating ones, "
                "and pick one of them by its number"
            )
        return members

    def least_violating(self, count: int = 3) -> list[Candidate]:
        """The measured candidates over the budget, those with the smallest excess first."""
        over = [c for c in self.candidates if c.measurement is not None and c.state == OVER_BUDGET]
        return sorted(over, key=lambda c: (c.violation, c.number))[:count]

    def hypervolume(self, upto: int | None = None) -> float:
        """The hypervolume of the front, with 1 as the reference on each axis: the baseline's cost, a metric of zero.

        It is 0 for a front that is nowhere cheaper than the baseline, and 1 for the baseline's metric at no cost.

        Args:
            upto: Only candidates with a smaller number count; None for all.
        """
        if upto is None:  # dominated points add no volume, and the members are known already
            counted: Sequence[Candidate] = self.members
        else:
            counted = [c for c in self._inside() if c.number < upto]
        return hypervolume([self.losses(c) for c in counted], [1.0] * len(self.objectives)) if counted else 0.0

    def table(self) -> pd.DataFrame:
        """All candidates as a pandas DataFrame, one row each, with intervals, states and reasons."""
        import pandas as pd

        members = {c.number for c in self.members}
        rows = []
        for c in self.candidates:
            row: dict[str, object] = {
                "number": c.number,
                "state": c.state,
                "front": c.number in members,
                "label": c.label,
                "reason": c.reason,
                "speed": self.speed(c),
                **(self.verdicts(c) if c.number in members else {}),
            }
            for prefix, metrics in (("", c.measurement.metrics if c.measurement else {}), ("test_", c.test)):
                row |= {prefix + name: value for name, value in flat(metrics).items()}
            row["recipe"] = c.recipe.to_json()
            rows.append(row)
        return pd.DataFrame(rows)

    def verdicts(self, member: Candidate) -> dict[str, object]:
        """The verdicts on a member; unknown ones are left out.

        Returns:
            `speed`: as `Front.speed`. `cluster`: the number of the cheapest member of its cluster, which is
            recommended in its place. `parity`: `passed`, or `failed: ` and how the file differs from the simulation.
        """
        said: dict[str, object] = {"speed": self.speed(member)} if self.speed(member) else {}
        if member.number in self.clusters:
            said["cluster"] = self.clusters[member.number]
        if "parity_metric" in member.test:
            said["parity"] = f"failed: {why}" if (why := parity_failure(member)) else "passed"
        return said

    def beside_baseline(self, candidate: Candidate) -> list[tuple[str, str, str]]:
        """Each metric of a measured candidate, its value, and the baseline's value, as text for people."""
        rows = []
        for name, estimate in candidate.measurement.metrics.items() if candidate.measurement else ():
            value, test = show(name, estimate.value), candidate.test.get(name)
            if test and name != "size_bytes":
                value += f" (test: {show(name, test.value)})"
            kind = f"{name}_difference"
            if (paired := candidate.test.get(kind)) is not None:
                value += f", {show(kind, paired.value)} {spread(kind, paired)} against the baseline there"
            base = self.baseline.metrics.get(name)
            rows.append((name, value, show(name, base.value) if base else "-"))
        return rows

    @property
    def machine(self) -> str:
        """The device that the candidates were measured on."""
        return self.baseline.environment.get("processor", "this machine")

    def export(self, pick: str, to: str | Path, force: bool = False) -> Path:
        """Write the candidate that `pick` selects as an artifact directory; see `results.export.export_candidate`."""
        from .export import export_candidate  # imports ONNX, which reading a front does not need

        candidate = self.select(pick)
        if self.folder is None:
            raise StudyError(f"candidate {candidate.number} has no file")
        return export_candidate(self.folder, candidate, Path(to), force=force, kept=_numbers(self.members))


def _by_size(candidate: Candidate) -> tuple[float, int]:
    assert candidate.measurement is not None
    return candidate.measurement.value("size_bytes"), candidate.number


def _numbers(members: Sequence[Candidate]) -> str:
    return ", ".join(str(c.number) for c in members) or "no member"


def open_front(directory: str | Path) -> Front:
    """Open the front of a study on disk; the task is not needed.

    Raises:
        StudyError: There is no study, or its files are damaged.
    """
    folder = StudyFolder(Path(directory).absolute())
    stored = folder.read_about()
    candidates, test = read_candidates(folder)
    return Front(
        tuple(candidates),
        tuple(Objective(**entry) for entry in stored["objectives"]),
        Budget.parse(stored["snapshot"]["budget"]),
        Measurement.from_dict(stored["baseline"]),
        folder.root,
        test,
    )
