"""Evaluation of candidates by the study's objectives and limits, from measured numbers and predicted costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ..errors import OverBudget
from ..objectives import cost
from ..objectives.excess import check_budget, describe_excess
from ..objectives.measurement import Measurement
from ..objectives.objective import Budget, Limit, Objective
from ..results.candidate import OK, OVER_BUDGET, Candidate
from ..runners.runner import OVER_BUDGET as REFUSED
from ..runners.runner import STOPPED, Failure, Outcome
from ..spaces.recipe import Recipe
from ..spaces.structure import Structure
from ..spaces.techniques.ensemble import Ensemble
from .preflight import TOLERANCE

PREDICTED = ("size_bytes", "macs")  # metrics that are computed exactly before anything is compressed


@dataclass(frozen=True)
class Observation:
    """What a sampler is told about a candidate.

    Args:
        values: The values of the objectives, in their order.
        constraints: For each limit, its excess as a share of the limit.
        unknown: Positions in `values` and limits in `constraints` that were not measured; they hold placeholders.
    """

    values: list[float]
    constraints: dict[str, float]
    unknown: list[int | str]


@dataclass(frozen=True)
class Judge:
    """The objectives and limits of a study, and the baseline that they are relative to.

    Args:
        objectives: The objectives.
        budget: The limits that a candidate must keep.
        metric: The name of the task's metric.
        structure: The structure of the network.
        baseline: The original model's numbers.
        overheads: For each network by name, the bytes of its files besides its layers' tensors; "" is the original
            model.
    """

    objectives: tuple[Objective, ...]
    budget: Budget
    metric: str
    structure: Structure
    baseline: Measurement
    overheads: Mapping[str, cost.FileOverhead]

    @cached_property
    def baseline_values(self) -> dict[str, float]:
        return self.baseline.values

    @property
    def times(self) -> bool:
        """Whether latency is an objective or limited."""
        return self.limits_latency or any(o.metric == "latency_ms" for o in self.objectives)

    @property
    def limits_latency(self) -> bool:
        return any(limit.metric == "latency_ms" for limit in self.budget.limits)

    @cached_property
    def metric_objective(self) -> Objective | None:
        """The objective on the task's metric; None where it is no objective or is minimized."""
        return next((o for o in self.objectives if o.metric == self.metric and o.maximize), None)

    @property
    def other_objectives(self) -> tuple[Objective, ...]:
        return tuple(o for o in self.objectives if o is not self.metric_objective)

    def losses(self, measurement: Measurement, objectives: tuple[Objective, ...] | None = None) -> tuple[float, ...]:
        """The given objectives, by default all, as numbers to minimize, relative to the baseline."""
        chosen = self.objectives if objectives is None else objectives
        return tuple(o.loss(measurement.value(o.metric), self.baseline.value(o.metric)) for o in chosen)

    # ------------------------------------------------------------------------------------------------ prediction

    def predicted(self, recipe: Recipe) -> dict[str, float]:
        """The predicted costs of a recipe by metric: its bytes and MACs."""
        macs = float(cost.macs(self.structure, recipe))
        if recipe.of(Ensemble):
            return {"macs": macs}
        size = float(cost.size_bytes(self.structure, recipe, self.overheads.get(recipe.factory, self.overheads[""])))
        return {"size_bytes": size, "macs": macs}

    def rejected(self, recipe: Recipe) -> Outcome | None:
        """The outcome of a recipe that is rejected by its predicted cost; None where it keeps all limits."""
        try:
            check_budget(self.budget, self.predicted(recipe), self.baseline_values, {"size_bytes": TOLERANCE})
        except OverBudget as refusal:
            return Outcome(None, Failure(REFUSED, f"refused: {refusal}", refusal.excess), 0.0)
        return None

    # ----------------------------------------------------------------------------------------------- judgement

    def candidate(
        self, number: int, recipe: Recipe, outcome: Outcome, picks: Mapping[str, int] | None, label: str
    ) -> Candidate:
        """The candidate for a recipe and the outcome of its trial."""
        failure, measurement = outcome.failure, outcome.measurement
        if failure is not None:
            excess = dict(failure.excess)
            if failure.state == STOPPED and measurement is not None:
                excess = self.excess(measurement)
            return Candidate(number, recipe, failure.state, failure.reason, measurement, excess, picks, label)
        assert measurement is not None
        measurement = replace(measurement, seconds={**measurement.seconds, "total": outcome.seconds})
        excess = self.excess(measurement)
        over = {limit: value for limit, value in excess.items() if value > 0}
        reason = describe_excess(self.budget, measurement.values, over, self.baseline_values) if over else ""
        return Candidate(number, recipe, OVER_BUDGET if over else OK, reason, measurement, excess, picks, label)

    def excess(self, measurement: Measurement) -> dict[str, float]:
        """The excess over each limit, as a share of the limit."""
        return self.budget.excess(measurement.values, self.baseline_values)

    def keeps_costs(self, candidate: Candidate) -> bool:
        """Whether a candidate was fully measured and keeps the limits on costs, which training does not change."""
        lasting = {limit.text for limit in self.budget.limits if limit.metric != self.metric}
        return (
            candidate.state in (OK, OVER_BUDGET)
            and candidate.measurement is not None
            and all(candidate.excess.get(text, 0.0) <= 0 for text in lasting)
        )

    def metric_limits(self) -> list[Limit]:
        """The lower limits on the task's metric."""
        return [limit for limit in self.budget.limits if limit.metric == self.metric and not limit.upper]

    def observation(self, candidate: Candidate) -> Observation:
        """What the sampler is told about a candidate.

        For a rejected recipe, unknown values are replaced by the worst possible ones (a metric of zero, the baseline's
        cost). Optuna's samplers rank infeasible trials by the excess, which is known; our own ignores unknown values.
        """
        known = self.predicted(candidate.recipe)
        if candidate.measurement:
            known = candidate.measurement.values
        values = [known.get(o.metric, self.worst(o)) for o in self.objectives]
        excess = {limit.text: candidate.excess.get(limit.text, 0.0) for limit in self.budget.limits}
        unknown: list[int | str] = [place for place, o in enumerate(self.objectives) if o.metric not in known]
        unknown += [text for text in excess if text not in candidate.excess]
        return Observation(values, excess, unknown)

    def worst(self, objective: Objective) -> float:
        """The reference value for the hypervolume: a metric of zero, or the baseline's cost."""
        return 0.0 if objective.maximize else self.baseline.value(objective.metric)

    def worst_allowed(self, objective: Objective) -> float:
        """The worst value that the budget allows, which our sampler uses as the reference point.

        With a metric of zero as the reference, two points of accuracy weigh nothing compared with two per cent of the
        bytes, and a search spends its trials at the edge of the limits.
        """
        worst, sign = self.worst(objective), 1 if objective.maximize else -1
        limits = [limit for limit in self.budget.limits if limit.metric == objective.metric]
        base = self.baseline.value(objective.metric)
        bounds = [limit.resolve(base) for limit in limits if limit.upper != objective.maximize]
        return sign * max([sign * worst, *(sign * bound for bound in bounds)])
