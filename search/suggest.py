"""The sampler of a study: ours, which is told what arithmetic knows, or one of Optuna's, made anew for every
suggestion.
"""

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
    """Gives the sampler for the next suggestion.

    Args:
        name: The sampler's.
        seed: Of all suggestions.
        judge: What is good, and what arithmetic predicts.
        space: What is searched.
        axes: Its decisions.
        distributions: Those of them that have a choice.
        computed: Whether latency is computed on the target, and not noisy.
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
        """The sampler for the suggestion after so many records."""
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
        # By axis of one network alone, at which choice of the network it has an effect.
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
