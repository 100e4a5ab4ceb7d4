"""What is good in a study: its objectives and limits, held against what is measured, and what arithmetic predicts."""

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

PREDICTED = ("size_bytes", "macs")  # metrics that arithmetic gives


@dataclass(frozen=True)
class Observation:
    """What a sampler learns of a candidate.

    Args:
        values: The objectives, in their order.
        constraints: By limit, its excess as a share of it.
        unknown: Places in `values` and limits in `constraints` that nobody knows; what stands there is made up.
    """

    values: list[float]
    constraints: dict[str, float]
    unknown: list[int | str]


@dataclass(frozen=True)
class Judge:
    """The objectives and limits of a study, and the baseline that they are relative to.

    Args:
        objectives: What to pursue.
        budget: What a candidate must keep.
        metric: Name of the task's metric.
        structure: Of the network.
        baseline: The original network's numbers.
        overheads: By name the bytes of a network's files around its layers' tensors; "" is the original network.
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
        """The objective that is the task's metric, where it is one and is maximised."""
        return next((o for o in self.objectives if o.metric == self.metric and o.maximize), None)

    @property
    def other_objectives(self) -> tuple[Objective, ...]:
        return tuple(o for o in self.objectives if o is not self.metric_objective)

    def losses(self, measurement: Measurement, objectives: tuple[Objective, ...] | None = None) -> tuple[float, ...]:
        """The objectives (or some of them) as numbers to minimise, relative to the baseline."""
        chosen = self.objectives if objectives is None else objectives
        return tuple(o.loss(measurement.value(o.metric), self.baseline.value(o.metric)) for o in chosen)

    # ------------------------------------------------------------------------------------------------ prediction

    def predicted(self, recipe: Recipe) -> dict[str, float]:
        """What arithmetic says of a recipe's costs."""
        macs = float(cost.macs(self.structure, recipe))
        if recipe.of(Ensemble):
            return {"macs": macs}
        size = float(cost.size_bytes(self.structure, recipe, self.overheads.get(recipe.factory, self.overheads[""])))
        return {"size_bytes": size, "macs": macs}

    def rejected(self, recipe: Recipe) -> Outcome | None:
        """The outcome of a recipe whose predicted costs exceed a limit, None where they keep all."""
        try:
            check_budget(self.budget, self.predicted(recipe), self.baseline_values, {"size_bytes": TOLERANCE})
        except OverBudget as refusal:
            return Outcome(None, Failure(REFUSED, f"refused: {refusal}", refusal.excess), 0.0)
        return None

    # ----------------------------------------------------------------------------------------------- judgement

    def candidate(
        self, number: int, recipe: Recipe, outcome: Outcome, picks: Mapping[str, int] | None, label: str
    ) -> Candidate:
        """What became of a recipe, from the outcome of its trial."""
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
        """By what share each limit is exceeded."""
        return self.budget.excess(measurement.values, self.baseline_values)

    def keeps_costs(self, candidate: Candidate) -> bool:
        """Whether all is known of a candidate, and it keeps the limits that training does not change."""
        lasting = {limit.text for limit in self.budget.limits if limit.metric != self.metric}
        return (
            candidate.state in (OK, OVER_BUDGET)
            and candidate.measurement is not None
            and all(candidate.excess.get(text, 0.0) <= 0 for text in lasting)
        )

    def metric_limits(self) -> list[Limit]:
        """The limits below which the task's metric must not fall."""
        return [limit for limit in self.budget.limits if limit.metric == self.metric and not limit.upper]

    def observation(self, candidate: Candidate) -> Observation:
        """What the sampler learns of a candidate.

        Of a recipe that was rejected, what is not known is told as the worst there is (a metric of zero, the baseline's
        cost): among infeasible trials Optuna's samplers rank by the excess, which is known. Ours leaves it out.
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
        """Where the hypervolume is counted from: a metric of zero, the baseline's cost."""
        return 0.0 if objective.maximize else self.baseline.value(objective.metric)

    def worst_allowed(self, objective: Objective) -> float:
        """The worst value that the budget allows: our sampler counts from there, so that what lies inside weighs.

        Counted from a metric of zero, two points of accuracy are nothing beside two per cent of the bytes, and a search
        spends its trials at the very edge of what the limits allow.
        """
        worst, sign = self.worst(objective), 1 if objective.maximize else -1
        limits = [limit for limit in self.budget.limits if limit.metric == objective.metric]
        base = self.baseline.value(objective.metric)
        bounds = [limit.resolve(base) for limit in limits if limit.upper != objective.maximize]
        return sign * max([sign * worst, *(sign * bound for bound in bounds)])
