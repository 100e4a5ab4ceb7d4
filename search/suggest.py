"""The sampler of a study, constructed anew for every suggestion: our own, which uses predicted costs, or Optuna's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler

from ..objectives import cost
from ..spaces.rules import Axis
from ..spaces.space import Space
from .ehvi import EHVISampler
from .gaussian import Floats, Ints
from .judge import PREDICTED, Judge
from .sampler import in_space, make_sampler

OURS = "ehvi"


class Suggester:
    """Constructs the sampler for the next suggestion.

    Args:
        name: The name of the sampler.
        seed: The seed of all suggestions.
        judge: The objectives and limits, and the predicted costs.
        space: The search space.
        axes: The axes of the space.
        distributions: The axes with more than one choice, as Optuna's distributions.
        computed: Whether the target computes latency, so that it has no noise.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        judge: Judge,
        space: Space,
        axes: Sequence[Axis],
        distributions: Mapping[str, BaseDistribution],
        computed: bool,
    ) -> None:
        self.name, self.seed, self.judge, self.computed = name, seed, judge, computed
        self.space, self.axes, self.distributions = space, tuple(axes), dict(distributions)
        self.ours: EHVISampler | None = None

    def sampler(self, records: int) -> BaseSampler:
        """The sampler for the suggestion after `records` lines of the journal."""
        if self.name != OURS:
            return make_sampler(self.name, self.seed, records, self.distributions)
        if self.ours is None:
            self.ours = self._make_ours()
        return self.ours

    def _make_ours(self) -> EHVISampler:
        judge, axes = self.judge, self.axes
        students = {name: overhead for name, overhead in judge.overheads.items() if name}
        costs = cost.many(judge.structure, axes, judge.overheads[""], students)
        exact = {place: o.metric for place, o in enumerate(judge.objectives) if o.metric in PREDICTED}
        limits = [limit for limit in judge.budget.limits if limit.metric in PREDICTED]

        def known(picks: Mapping[str, Ints]) -> tuple[dict[int, Floats], dict[str, Floats]]:
            count = len(next(iter(picks.values())))
            columns = [picks.get(axis.name, np.zeros(count, dtype=np.int64)) for axis in axes]
            values = costs(np.stack(columns, axis=1))
            base = judge.baseline_values
            excess = {limit.text: limit.excess(values[limit.metric], base[limit.metric]) for limit in limits}
            return {place: values[metric] for place, metric in exact.items()}, excess

        latencies = [place for place, o in enumerate(judge.objectives) if o.metric == "latency_ms"]
        # For each axis that belongs to a single network: the choice of the network at which it has an effect.
        places = {student.factory if student else "": place for place, student in enumerate(self.space.students)}
        conditions = {axis.name: ("student", places[axis.student]) for axis in axes if axis.student in places}
        sampler = EHVISampler(
            self.seed,
            known=known,
            reference=[judge.worst_allowed(objective) for objective in judge.objectives],
            noisy=[] if self.computed else latencies,
            ladder="recovery" if self.space.ladder else None,
            conditions=conditions,
            kinds={axis.name: (axis.kind, axis.choices) for axis in axes},
        )
        in_space(sampler, self.distributions)
        return sampler
