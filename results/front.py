"""The front: the candidates inside the budget that no other beats, and how to choose among them."""

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
    """All candidates of a study, and the best among them.

    `members` is the front, the smallest first. `baseline` is the measurement of the untouched network.
    """

    candidates: tuple[Candidate, ...]
    objectives: tuple[Objective, ...]
    budget: Budget
    baseline: Measurement
    directory: Path | None = None
    test_baseline: Estimate | None = None

    def losses(self, candidate: Candidate) -> list[float]:
        """The objectives as numbers to minimise, relative to the baseline."""
        if candidate.measurement is None:
            raise StudyError(f"candidate {candidate.number} was never measured ({candidate.reason})")
        return [o.loss(candidate.measurement.value(o.metric), self.baseline.value(o.metric)) for o in self.objectives]

    @cached_property
    def members(self) -> tuple[Candidate, ...]:
        """The candidates inside the budget that nothing beats; of equal ones the first."""
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
        """The metric that is not a cost: the first such objective, else the first such metric that was measured."""
        names = [o.metric for o in self.objectives] + [m for m in self.baseline.metrics if not m.endswith("_bytes")]
        return next((name for name in names if name not in COSTS), self.objectives[0].metric)

    def maximizes(self, metric: str) -> bool:
        """Whether more of a metric is better."""
        return next((o.maximize for o in self.objectives if o.metric == metric), metric not in COSTS)

    def latency(self, candidate: Candidate) -> tuple[Estimate, Estimate] | None:
        """A candidate's latency and the baseline's, to be compared; None where it was not measured.

        Of a finalist that is the ratio that the clean process has measured, and 1.
        """
        if (ratio := candidate.test.get("latency_ratio")) is not None:
            return ratio, Estimate.exact(1.0)
        found = candidate.measurement.metrics.get("latency_ms") if candidate.measurement else None
        base = self.baseline.metrics.get("latency_ms")
        return None if found is None or base is None else (found, base)

    def speed(self, candidate: Candidate) -> str:
        """`faster`, `same speed` or `slower` than the baseline by the 95% intervals; empty where it was not
        measured.
        """
        pair = self.latency(candidate)
        return speed(*pair) if pair else ""

    @property
    def folder(self) -> StudyFolder | None:
        """The study's folder, None of a front that was never on disk."""
        return None if self.directory is None else StudyFolder(self.directory)

    @cached_property
    def clusters(self) -> dict[int, int]:
        """Members that the test split cannot tell apart; see `results.certainty.clusters`."""
        folder = self.folder
        scores = {
            m.number: each
            for m in self.members
            if folder is not None and (each := folder.read_finalist_scores(m.recipe.key)) is not None
        }
        costs = [o.metric for o in self.objectives if o.metric in COSTS]
        return clusters(self.members, scores, costs, self.maximizes(self.quality))

    def optimism(self) -> Estimate | None:
        """How much selection on the validation split has flattered the front; see `results.certainty.optimism`."""
        name, folder = self.quality, self.folder
        measured = [(m, m.measurement) for m in self.members if m.measurement and name in m.measurement.metrics]
        tested = [(m, found) for m, found in measured if name in m.test]
        if not tested or self.test_baseline is None or name not in self.baseline.metrics:
            return None
        sign = 1.0 if self.maximizes(name) else -1.0
        usual = self.baseline.value(name) - self.test_baseline.value
        losses = [sign * (found.value(name) - m.test[name].value - usual) for m, found in tested]
        if folder is None:
            return optimism(losses, (), ())
        keys = [m.recipe.key for m, _ in tested]
        validation = [folder.candidates.read_scores(key) for key in (Recipe().key, *keys)]
        return optimism(losses, validation, [folder.read_finalist_scores(key) for key in (BASELINE, *keys)])

    def knee(self) -> Candidate:
        """The member farthest below the plane through the front's extremes."""
        return self._knee(self.members)

    def _knee(self, members: tuple[Candidate, ...]) -> Candidate:
        return self._chosen(members)[knee([self.losses(c) for c in members])]

    def recommended(self) -> Candidate:
        """The knee, or the cheapest member that the test split cannot tell from it.

        Members whose file is not what was simulated are passed over, unless all are.
        """
        verified = tuple(m for m in self.members if not parity_failure(m))
        knee = self._knee(verified or self.members)
        number = self.clusters.get(knee.number, knee.number)
        return next(m for m in self.members if m.number == number)

    def best(self, metric: str) -> Candidate:
        """The member that is best in one objective."""
        objective = next((o for o in self.objectives if o.metric == metric), None)
        if objective is None:
            raise ConfigError(
                f"{metric!r} is not an objective here; choose from {', '.join(o.metric for o in self.objectives)}"
            )
        return min(self._chosen(self.members), key=lambda c: self.losses(c)[self.objectives.index(objective)])

    def select(self, pick: str) -> Candidate:
        """One candidate: `knee`, `recommended`, a number, an objective's name (its best), or limits (`size_bytes <=
        80kB`).

        Under limits (joined by `and`) the member best in the first objective is taken. Raises `ConfigError`.
        """
        text = pick.strip()
        if text == "knee":
            return self.knee()
        if text == "recommended":
            return self.recommended()
        if text.isdecimal():
            found = next((c for c in self.candidates if c.number == int(text)), None)
            if found is None or found.measurement is None or found.state == STOPPED:
                why = f"candidate {text} has no file ({found.reason})" if found else f"there is no candidate {text}"
                raise ConfigError(f"--pick {pick}: {why}; the front has {_numbers(self.members)}")
            return found
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
        """The measured candidates over the budget that miss it by the least."""
        over = [c for c in self.candidates if c.measurement is not None and c.state == OVER_BUDGET]
        return sorted(over, key=lambda c: (c.violation, c.number))[:count]

    def hypervolume(self, upto: int | None = None) -> float:
        """The volume of losses that the front dominates below 1 on each axis: the baseline's cost, a metric of zero.

        0 is a front that is nowhere cheaper than the baseline; 1 would be the baseline's metric at no cost at all.
        `upto` counts only the candidates numbered below it.
        """
        if upto is None:  # what is beaten adds nothing, and the members are known already
            counted: Sequence[Candidate] = self.members
        else:
            counted = [c for c in self._inside() if c.number < upto]
        return hypervolume([self.losses(c) for c in counted], [1.0] * len(self.objectives)) if counted else 0.0

    def table(self) -> pd.DataFrame:
        """All candidates as a pandas DataFrame, a row each, with intervals, states and reasons."""
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
        """What is said of a member in one word each; what is not known is not in it.

        speed: as `speed`. cluster: the number of the one that is recommended in its place, its own if it is that.
        parity: `passed`, or `failed: ` and in what its file is not what was simulated.
        """
        said: dict[str, object] = {"speed": self.speed(member)} if self.speed(member) else {}
        if member.number in self.clusters:
            said["cluster"] = self.clusters[member.number]
        if "parity_metric" in member.test:
            said["parity"] = f"failed: {why}" if (why := parity_failure(member)) else "passed"
        return said

    def beside_baseline(self, candidate: Candidate) -> list[tuple[str, str, str]]:
        """For people: each metric of a measured candidate, its value, and the baseline's."""
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
        """What the candidates were measured on."""
        return self.baseline.environment.get("processor", "this machine")

    def export(self, pick: str, to: str | Path, force: bool = False) -> Path:
        """Write the picked candidate as an artifact directory; see `results.export.export_candidate`."""
        from .export import export_candidate  # needs ONNX, which a front is read without

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
    """The front of a study on disk, without its task; raises `StudyError` when there is none."""
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
