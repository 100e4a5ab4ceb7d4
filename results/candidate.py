"""A candidate: a recipe, what became of it, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..objectives.measurement import Estimate, Measurement
from ..spaces.recipe import Recipe

OK, OVER_BUDGET, STOPPED, FAILED = "ok", "over_budget", "stopped", "failed"


@dataclass(frozen=True)
class Candidate:
    """One finished trial.

    Args:
        number: The candidate's number in its study, from 0.
        recipe: What was done to the model.
        state: `ok`; `over_budget` (rejected by its predicted cost, or measured and over a limit); `stopped`
            (significantly worse than another candidate, so its evaluation was stopped early and its metric covers
            only part of the samples); or `failed`.
        reason: Why it is in this state, for people.
        measurement: The measured numbers; None where nothing was measured.
        excess: For each limit, by what share of the limit it is exceeded; 0 or less keeps the limit.
        picks: The choice of each axis; None for a reference recipe that is not in the space.
        label: The name of a reference recipe; empty for a recipe that the sampler suggested.
        test: The numbers of a finalist, as `StudyFolder.read_finalists` reads them: the metric on the test split,
            `METRIC_difference` to the baseline's there, `latency_ms`, `latency_ratio` to the baseline's,
            `size_bytes`, and the comparison with the simulation, `parity_...`.
    """

    number: int
    recipe: Recipe
    state: str
    reason: str = ""
    measurement: Measurement | None = None
    excess: Mapping[str, float] = field(default_factory=dict)
    picks: Mapping[str, int] | None = None
    label: str = ""
    test: Mapping[str, Estimate] = field(default_factory=dict)

    @property
    def violation(self) -> float:
        """The sum of the excess over all exceeded limits, each as a share of its limit."""
        return sum(max(0.0, value) for value in self.excess.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "recipe": self.recipe.to_dict(),
            "state": self.state,
            "reason": self.reason,
            "measurement": self.measurement.to_dict() if self.measurement else None,
            "excess": dict(self.excess),
            "picks": dict(self.picks) if self.picks is not None else None,
            "label": self.label,
            "test": {name: vars(metric) for name, metric in self.test.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candidate:
        measurement = data["measurement"]
        return cls(
            number=data["number"],
            recipe=Recipe.from_dict(data["recipe"]),
            state=data["state"],
            reason=data["reason"],
            measurement=Measurement.from_dict(measurement) if measurement else None,
            excess=data["excess"],
            picks=data["picks"],
            label=data["label"],
            test={name: Estimate(**entry) for name, entry in data.get("test", {}).items()},
        )
