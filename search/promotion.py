"""Which candidate is trained further, and which ones it is compared with: the rungs of a study (see `search.rungs`).

A recipe is identified across rungs by its choices without those of recovery; on every rung it is a candidate with its
own number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..objectives.measurement import Estimate
from ..objectives.pareto import nondominated
from ..results.candidate import FAILED, Candidate
from ..results.front import Front
from ..runners.racing import Rival
from ..spaces.recipe import Recipe
from ..spaces.space import Space
from ..spaces.structure import Structure
from ..spaces.techniques.recover import Recover
from .history import History
from .judge import Judge
from .rungs import PILOT, Ladder, RungEntry, ranked

Scores = NDArray[np.floating]
_RELIABLE = 0.5  # the lowest Kendall's tau at which a rung predicts the next well enough to stop evaluations early


class Promotions:
    """The rungs of a study, and which candidate is on which.

    Args:
        space: The search space. Only a ladder has several rungs; otherwise all candidates are on one.
        structure: The structure of the network.
        judge: The objectives and limits.
        history: The study's candidates.
        read_scores: Returns the metric of a recipe on every validation sample; None where it is not stored.
    """

    def __init__(
        self,
        space: Space,
        structure: Structure,
        judge: Judge,
        history: History,
        read_scores: Callable[[Recipe], Scores | None],
    ) -> None:
        self.space, self.structure, self.judge, self.history = space, structure, judge, history
        names = [_rung_name(space.recoveries(choice)) for choice in space.recovery]
        self.ladder = Ladder(tuple(names) if space.ladder else ("candidates",))
        self.recovered: set[int] = set()  # candidates that training could not improve
        self._placed: dict[tuple[object, int], int] = {}  # the number of the candidate by choices and rung
        self._read_scores = read_scores
        self._scores: dict[int, Scores | None] = {}  # of rivals, by number

    @property
    def top(self) -> int:
        return len(self.ladder.names) - 1

    def rung(self, picks: Mapping[str, int] | None) -> int:
        """The rung of a candidate with these choices."""
        return picks.get("recovery", 0) if picks and self.space.ladder else 0

    def place(self, candidate: Candidate) -> None:
        """Put a candidate on its rung, and link it to its candidate on the rung below."""
        picks = candidate.picks
        if picks is None or not (candidate.measurement or candidate.state == FAILED):
            return
        rung, number = self.rung(picks), candidate.number
        same = tuple(
            (name, pick) for name, pick in sorted(picks.items()) if name != "recovery" or not self.space.ladder
        )
        self._placed[same, rung] = number
        below, above = self._placed.get((same, rung - 1)), self._placed.get((same, rung + 1))
        for origin, upper in ((below, number), (number, above)):
            if origin is not None and upper is not None:
                self.ladder.above[origin] = upper
        if candidate.measurement is None:
            if rung:
                self.ladder.rungs[rung].append(RungEntry(number, math.nan, eligible=False))
            return
        metric = candidate.measurement.metrics[self.judge.metric]
        if not candidate.recipe.steps or self._nothing_to_recover(metric):
            self.recovered.add(number)
        eligible = number not in self.recovered and self.judge.keeps_costs(candidate)
        losses = self.judge.losses(candidate.measurement)
        self.ladder.rungs[rung].append(RungEntry(number, metric.value, losses, eligible, bool(candidate.label)))

    def _nothing_to_recover(self, metric: Estimate) -> bool:
        """Whether the loss is below a quarter of the interval's width, so that no recovery could be distinguished."""
        return self.judge.baseline.value(self.judge.metric) - metric.value <= (metric.high - metric.low) / 4

    def next(self, front: Front, left: float, may: Callable[[int], bool]) -> dict[str, int] | None:
        """The choices of the candidate to train further; None when a new candidate should be started.

        The last trials of a study go to the members of the front: training can only add better candidates there.

        Args:
            front: The front so far.
            left: The number of remaining trials.
            may: Whether there is time for a trial on a rung.
        """
        above = self.ladder.above
        rung_of = {s.number: rung for rung, entries in enumerate(self.ladder.rungs) for s in entries if s.eligible}
        waiting = [
            (c.number, rung_of[c.number])
            for c in front.members
            if rung_of.get(c.number, self.top) < self.top and c.number not in above
        ]
        while True:
            last = [entry for entry in waiting if entry[0] not in above and may(entry[1] + 1)]
            promoted = last[0] if last and left <= len(waiting) else self.ladder.next_promotion(may)
            if promoted is None:
                return None
            number, rung = promoted
            picks = {**(self.history.candidates[number].picks or {}), "recovery": rung + 1}
            twin = self.history.by_key.get(self.space.recipe(self.structure, picks).key)
            if twin is None:
                return picks
            above[number] = twin.number  # other choices gave the same recipe, which was tried already

    def best(self, rung: int) -> list[RungEntry]:
        """The nondominated candidates of a rung."""
        candidates = self.history.candidates
        entries = [s for s in self.ladder.rungs[rung] if self.judge.keeps_costs(candidates[s.number])]
        return [s for s, kept in zip(entries, nondominated([s.losses for s in entries]), strict=True) if kept]

    def rivals(self, rung: int) -> tuple[Rival, ...]:
        """The candidates that a new one on a rung is compared with; if significantly worse, it is stopped early."""
        judge, base = self.judge, self.judge.baseline.value(self.judge.metric)
        last = rung == self.top
        limits = judge.metric_limits() if last else []
        original = self._read_scores(Recipe()) if limits else None
        rivals: list[Rival] = []
        if original is not None:
            rivals = [Rival("the untouched network", original, base - limit.resolve(base)) for limit in limits]
        # Below the top, training may still change the order, unless tau shows that it changes little.
        tau = None if last else self.ladder.tau(rung)
        objective = judge.metric_objective
        if objective is None or not (last or (tau is not None and tau >= _RELIABLE)):
            return tuple(rivals)
        place = judge.objectives.index(objective)
        for entry in self.best(rung):
            number = entry.number
            if number not in self._scores:
                self._scores[number] = self._read_scores(self.history.candidates[number].recipe)
            scores = self._scores[number]
            if scores is not None:
                losses = entry.losses[:place] + entry.losses[place + 1 :]
                rivals.append(Rival(f"#{number}", scores, losses=losses))
        return tuple(rivals)

    def likely(self) -> list[int]:
        """The numbers of the candidates that may be promoted soon, whose trained weights are therefore kept."""
        numbers: list[int] = []
        for rung, entries in enumerate(self.ladder.rungs):
            if 0 < rung < self.top:  # the lowest rung has no trained weights, and the top has no next rung
                eligible = [s for s in entries if s.eligible and s.number not in self.ladder.above]
                order = ranked([s.losses for s in eligible], max(PILOT, len(entries) // 2))
                numbers += [eligible[place].number for place in order]
        return numbers


def _rung_name(steps: Sequence[Recover]) -> str:
    """A rung for people: `untrained`, `0.2 epochs`, `0.2 + 0.4 epochs`."""
    epochs = [f"{step.epochs:g}" for step in steps if step.epochs]
    return f"{' + '.join(epochs)} epoch{'s' * (epochs != ['1'])}" if epochs else "untrained"
