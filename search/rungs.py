"""Rungs: how far a candidate is trained is decided by how it does with less training.

Training is what a search spends its time on, and most candidates are not worth it. So the choices of `recovery` are a
ladder. Every candidate begins at its foot, untrained or trained the least, with its file exported, timed and evaluated
like any other; of those on a rung the best third climbs to the next one and goes on from the weights it has (successive
halving without waiting, Li et al. 2020). Every rung of a candidate is a candidate of its own: a recipe, a file and
numbers, and one that is good enough untrained is a member of the front as it is.

*Best* is by nondominated rank, within a rank by what the hypervolume would lose (Emmerich et al. 2005): with several
objectives there is no median to be below, which is why Optuna offers no pruning there. Limits that training can mend (on
the task's metric) bar nobody's way; those on bytes, MACs and time do.

Whether a rung foretells the next is measured: Kendall's tau between the metrics of the candidates that are on both. The
first few candidates of the sampler climb to the top unasked, so that there is something to compare. Where tau is low, more climb (every
second, or all of them), which is the higher fidelity. The candidates that climbed were chosen, which makes tau smaller
than it is over all; it errs on the safe side.

The rung below them all, a part of the validation images, is not decided by rank but by a test: see `objectives.paired`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import kendalltau

from ..objectives.pareto import hypervolume, nondominated

PILOT = 3  # candidates that climb to the top whatever they are, so that the rungs can be compared
_PAIRS = 6  # below which a rank correlation says nothing
_USUAL = 3.0  # of so many one climbs


@dataclass(frozen=True)
class RungEntry:
    """A candidate on a rung.

    metric: the task's, higher is better, NaN when it failed. losses: what is minimised. eligible: whether more training
    could make a member of the front of it. given: whether it is a trivial baseline, which is there to be compared with.
    """

    number: int
    metric: float
    losses: tuple[float, ...] = ()
    eligible: bool = True
    given: bool = False


@dataclass
class Ladder:
    """The candidates by rung, and who climbs next.

    names: the rungs for people, from the foot. rungs: who stands on each. above: by number, what a candidate became on
    the next rung.
    """

    names: tuple[str, ...]
    rungs: list[list[RungEntry]] = field(init=False)
    above: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.rungs = [[] for _ in self.names]

    def tau(self, rung: int) -> float | None:
        """Kendall's tau between a rung and the next over those on both; None when they are too few to tell."""
        upper = {s.number: s.metric for s in self.rungs[rung + 1]}
        both = [(s.metric, upper[self.above[s.number]]) for s in self.rungs[rung] if self.above.get(s.number) in upper]
        pairs = [pair for pair in both if all(map(math.isfinite, pair))]
        if len(pairs) < _PAIRS:
            return None
        found = float(kendalltau(*zip(*pairs, strict=True)).statistic)
        return None if math.isnan(found) else found

    def taus(self) -> dict[str, float]:
        """Kendall's tau of each pair of neighbouring rungs that is known, by `tau.0-1`, ..."""
        found = {f"tau.{rung}-{rung + 1}": self.tau(rung) for rung in range(len(self.rungs) - 1)}
        return {name: tau for name, tau in found.items() if tau is not None}

    def reduction(self, rung: int) -> float:
        """Of how many candidates on a rung one climbs: fewer the less the rung foretells the next."""
        tau = self.tau(rung)
        if tau is None or tau >= 0.5:
            return _USUAL
        return 2.0 if tau >= 0.25 else 1.0

    def next_promotion(self, may: Callable[[int], bool] = lambda rung: True) -> tuple[int, int] | None:
        """`(number, its rung)` of the candidate to train further, None when a new one should be begun.

        The highest rungs come first. `may` says whether there is time for training up to a rung.
        """
        for rung in reversed(range(len(self.rungs) - 1)):
            if not may(rung + 1):
                continue
            eligible = [s for s in self.rungs[rung] if s.eligible]
            pilots = [s.number for s in eligible if not s.given][:PILOT]
            waiting = [number for number in pilots if number not in self.above]
            room = math.floor(len(self.rungs[rung]) / self.reduction(rung))
            if not waiting and sum(s.number in self.above for s in eligible) < room:
                order = ranked([s.losses for s in eligible], room)
                waiting = [eligible[i].number for i in order if eligible[i].number not in self.above]
            if waiting:
                return waiting[0], rung
        return None

    def shares(self) -> list[float]:
        """Of all that will be carried out, the share on each rung."""
        counts = [1.0]
        for rung in range(len(self.rungs) - 1):
            counts.append(counts[-1] / self.reduction(rung))
        return [count / sum(counts) for count in counts]

    def describe(self) -> str:
        """How many stand on each rung, and how well it foretells the next.

        >>> ladder = Ladder(("untrained", "1 epoch"))
        >>> ladder.rungs[0].append(RungEntry(0, 0.5, (0.5, 0.1)))
        >>> ladder.describe()
        '1 untrained, 0 of 1 epoch'
        """
        counts = ", ".join(f"{len(s)} {name if name[0].isalpha() else 'of ' + name}" for s, name in zip(self.rungs, self.names, strict=True))  # fmt: skip
        taus = [(rung, self.tau(rung)) for rung in range(len(self.rungs) - 1)]
        known = [f"{self.names[rung]} -> {self.names[rung + 1]} {tau:.2f}" for rung, tau in taus if tau is not None]
        return counts + (f"; Kendall's tau {', '.join(known)}" if known else "")


def ranked(points: Sequence[Sequence[float]], count: int) -> list[int]:
    """The best `count` rows: nondominated rank by rank, within a rank those that the hypervolume would miss the most.

    The reference is a tenth of the span beyond the worst row.

    >>> ranked([[0.0, 1.0], [0.5, 0.4], [0.6, 0.5], [0.45, 0.45]], 3)
    [3, 0, 1]
    """
    p = np.asarray(points, dtype=float)
    if not len(p) or count <= 0:
        return []
    reference = p.max(0) + 0.1 * (np.ptp(p, axis=0) + 1e-12)
    left = np.arange(len(p))
    found: list[int] = []
    while len(left) and len(found) < count:
        front = left[nondominated(p[left])]
        if len(front) > 1:
            whole = hypervolume(p[front], reference)
            missed = [whole - hypervolume(np.delete(p[front], i, axis=0), reference) for i in range(len(front))]
            front = front[np.argsort(-np.asarray(missed), kind="stable")]
        found += front.tolist()
        left = np.setdiff1d(left, front)
    return found[:count]
