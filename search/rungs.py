"""Rungs: how long a candidate is trained depends on how it does with less training.

Most of a search's time goes into training, and most candidates are not worth it. The choices of `recovery` are
therefore the rungs of an asynchronous successive halving (ASHA, Li et al. 2020) with one bracket. Every candidate
starts on the lowest rung, untrained or trained the least; its file is exported, timed and evaluated like any other.
The best third of a rung is promoted to the next one, where training continues from the weights they have. A promotion
makes a new candidate, with a recipe, a file and measurements of its own, so a candidate that is good enough untrained
is a member of the front as it is.

*Best* means by nondominated rank, and within a rank by hypervolume contribution (Emmerich et al. 2005). With several
objectives there is no median to compare with, which is why Optuna offers no pruning there. A candidate that exceeds a
limit on the task's metric can be promoted, since training may mend it; one that exceeds a limit on bytes, MACs or
latency cannot.

Whether a rung predicts the next one is measured by Kendall's tau between the metrics of the candidates on both. The
first candidates of the sampler (`PILOT`) are promoted to the top in any case, so that there is something to compare.
Where tau is low the reduction factor is smaller: every second candidate is promoted, or all of them. Since promoted
candidates are selected ones, the measured tau is smaller than the tau over all candidates, which errs on the safe side.

Below the lowest rung, an evaluation on a part of the validation images is stopped early by a statistical test, not by
rank: see `objectives.paired`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import kendalltau

from ..objectives.pareto import hypervolume, nondominated

PILOT = 3  # candidates that are promoted to the top in any case, so that rungs can be compared
_PAIRS = 6  # candidates on two rungs from which on a rank correlation is computed
_REDUCTION = 3.0  # the usual reduction factor: one of so many is promoted


@dataclass(frozen=True)
class RungEntry:
    """A candidate on a rung.

    Attributes:
        number: The candidate's number.
        metric: The task's metric, higher is better; NaN when the candidate failed.
        losses: The objectives, to be minimized.
        eligible: Whether it could become a member of the front with more training.
        given: Whether it is a reference recipe rather than one the sampler suggested.
    """

    number: int
    metric: float
    losses: tuple[float, ...] = ()
    eligible: bool = True
    given: bool = False


@dataclass
class Ladder:
    """The candidates by rung, and which one is promoted next.

    Attributes:
        names: The rungs' names for people, from the lowest.
        rungs: The entries of each rung.
        above: By candidate number, the number of the candidate it became on the next rung.
    """

    names: tuple[str, ...]
    rungs: list[list[RungEntry]] = field(init=False)
    above: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.rungs = [[] for _ in self.names]

    def tau(self, rung: int) -> float | None:
        """Kendall's tau between a rung and the next, over the candidates on both; None for fewer than six."""
        upper = {entry.number: entry.metric for entry in self.rungs[rung + 1]}
        promoted = [entry for entry in self.rungs[rung] if self.above.get(entry.number) in upper]
        both = [(entry.metric, upper[self.above[entry.number]]) for entry in promoted]
        pairs = [pair for pair in both if all(map(math.isfinite, pair))]
        if len(pairs) < _PAIRS:
            return None
        tau = float(kendalltau(*zip(*pairs, strict=True)).statistic)
        return None if math.isnan(tau) else tau

    def taus(self) -> dict[str, float]:
        """Kendall's tau of each pair of neighbouring rungs where it is known, named `tau.0-1`, ..."""
        taus = {f"tau.{rung}-{rung + 1}": self.tau(rung) for rung in range(len(self.rungs) - 1)}
        return {name: tau for name, tau in taus.items() if tau is not None}

    def reduction(self, rung: int) -> float:
        """The reduction factor: of how many candidates on a rung one is promoted; smaller where tau is low."""
        tau = self.tau(rung)
        if tau is None or tau >= 0.5:
            return _REDUCTION
        return 2.0 if tau >= 0.25 else 1.0

    def next_promotion(self, may: Callable[[int], bool] = lambda rung: True) -> tuple[int, int] | None:
        """`(number, rung)` of the candidate to promote next; None when a new candidate should be started.

        Higher rungs come first, and on a rung the pilots. `may` says whether there is time to train up to a rung.
        """
        for rung in reversed(range(len(self.rungs) - 1)):
            if not may(rung + 1):
                continue
            eligible = [entry for entry in self.rungs[rung] if entry.eligible]
            pilots = [entry.number for entry in eligible if not entry.given][:PILOT]
            waiting = [number for number in pilots if number not in self.above]
            room = math.floor(len(self.rungs[rung]) / self.reduction(rung))
            if not waiting and sum(entry.number in self.above for entry in eligible) < room:
                order = ranked([entry.losses for entry in eligible], room)
                waiting = [eligible[i].number for i in order if eligible[i].number not in self.above]
            if waiting:
                return waiting[0], rung
        return None

    def shares(self) -> list[float]:
        """The expected share of each rung among all candidates."""
        counts = [1.0]
        for rung in range(len(self.rungs) - 1):
            counts.append(counts[-1] / self.reduction(rung))
        return [count / sum(counts) for count in counts]

    def describe(self) -> str:
        """The number of candidates on each rung, and Kendall's tau to the next.

        >>> ladder = Ladder(("untrained", "1 epoch"))
        >>> ladder.rungs[0].append(RungEntry(0, 0.5, (0.5, 0.1)))
        >>> ladder.describe()
        '1 untrained, 0 of 1 epoch'
        """
        names = [name if name[0].isalpha() else f"of {name}" for name in self.names]
        counts = ", ".join(f"{len(entries)} {name}" for entries, name in zip(self.rungs, names, strict=True))
        taus = [(rung, self.tau(rung)) for rung in range(len(self.rungs) - 1)]
        known = [f"{self.names[rung]} -> {self.names[rung + 1]} {tau:.2f}" for rung, tau in taus if tau is not None]
        return counts + (f"; Kendall's tau {', '.join(known)}" if known else "")


def ranked(points: Sequence[Sequence[float]], count: int) -> list[int]:
    """The positions of the best `count` rows, by nondominated rank and within a rank by hypervolume contribution.

    The reference point lies a tenth of each objective's range beyond its worst value.

    Args:
        points: `[rows, objectives]`, losses.
        count: How many rows to return; the last rank may be cut.

    >>> ranked([[0.0, 1.0], [0.5, 0.4], [0.6, 0.5], [0.45, 0.45]], 3)
    [3, 0, 1]
    """
    losses = np.asarray(points, dtype=float)
    if not len(losses) or count <= 0:
        return []
    reference = losses.max(0) + 0.1 * (np.ptp(losses, axis=0) + 1e-12)
    left = np.arange(len(losses))
    order: list[int] = []
    while len(left) and len(order) < count:
        front = left[nondominated(losses[left])]
        if len(front) > 1:
            whole, members = hypervolume(losses[front], reference), losses[front]
            contributions = [whole - hypervolume(np.delete(members, i, axis=0), reference) for i in range(len(front))]
            front = front[np.argsort(-np.asarray(contributions), kind="stable")]
        order += front.tolist()
        left = np.setdiff1d(left, front)
    return order[:count]
