"""What the numbers of a front can and cannot tell: clusters of indistinguishable members, and the bias of selection.

The functions take members and scores instead of a `Front`, because `results.front` imports this module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..objectives.display import show, spread
from ..objectives.measurement import Z95, Estimate
from ..objectives.paired import paired
from .candidate import Candidate
from .parity import parity_failure

Scores = NDArray[np.floating]


def clusters(
    members: Sequence[Candidate], scores: Mapping[int, Scores], costs: Sequence[str], maximize: bool
) -> dict[int, int]:
    """Group members that cannot be distinguished; the cheapest member of a cluster can stand for all of it.

    From the cheapest member on, each joins the first cluster whose cheapest member (its head) it has no advantage over:
    its metric on the test split is not significantly better (paired 95% interval), and no other cost among the
    objectives is lower (for a latency: its interval does not lie below the head's). Otherwise it starts a cluster of
    its own. The cheapest member is the smallest in bytes, or the one with the lowest first cost where bytes are not an
    objective.

    The level is 5% for each pair. It is deliberately not corrected for the number of pairs: a correction makes clusters
    larger, and the expensive mistake is to recommend a worse file as equal.

    Args:
        members: The members of a front.
        scores: For each member's number, its metric on every test sample. Members without scores are in no cluster,
            and neither are those whose file does not compute what was simulated.
        costs: The costs among the objectives.
        maximize: Whether more of the metric is better.

    Returns:
        For each member's number, the number of its cluster's head.
    """
    first = "size_bytes" if "size_bytes" in costs or not costs else costs[0]
    known = [m for m in members if m.number in scores and m.test and not parity_failure(m)]
    sign = 1.0 if maximize else -1.0
    heads: list[Candidate] = []
    head_of: dict[int, int] = {}

    def better(member: Candidate, head: Candidate) -> bool:
        mine, other = scores[member.number], scores[head.number]
        return mine.shape != other.shape or paired(sign * mine, sign * other).low > 0 or _cheaper(member, head, costs)

    for member in sorted(known, key=lambda m: (_cost(m, first).value, m.number)):
        head = next((head for head in heads if not better(member, head)), None)
        if head is None:
            heads.append(head := member)
        head_of[member.number] = head.number
    return head_of


def _cost(member: Candidate, name: str) -> Estimate:
    """A cost of a measured candidate; for a finalist's latency, the one measured as a finalist."""
    assert member.measurement is not None
    return member.test.get(name) or member.measurement.metrics[name]


def _cheaper(member: Candidate, head: Candidate, costs: Sequence[str]) -> bool:
    return any(_cost(member, name).high < _cost(head, name).low for name in costs)


def optimism(
    losses: Sequence[float], validation: Sequence[Scores | None], test: Sequence[Scores | None]
) -> Estimate | None:
    """How much more than the baseline the members lose, on average, from the validation to the test split.

    Above zero, selection has made the members look better than they are. The 95% interval is normal: the two splits
    are independent, and on each of them all members are evaluated on the same samples.

    Args:
        losses: For each member, the loss of its metric from validation to test less the baseline's.
        validation: The scores on the validation split, the baseline's first, then each member's.
        test: The same on the test split. Without all scores there is no interval.

    Returns:
        The mean with its interval; None without members.
    """
    if not losses:
        return None
    value = float(np.mean(losses))
    variance = 0.0
    for scores in (validation, test):
        base, *others = scores or (None,)
        present = [each for each in others if each is not None and base is not None and each.shape == base.shape]
        if base is None or len(present) < len(others):
            return Estimate.exact(value)
        d = np.mean([each.astype(np.float64) - base for each in present], axis=0)
        variance += float(d.var(ddof=1)) / len(d) if len(d) > 1 else 0.0
    half = Z95 * math.sqrt(variance)
    return Estimate(value, value - half, value + half, len(losses))


def describe_clusters(head_of: Mapping[int, int], metric: str) -> list[str]:
    """A line for each cluster of two or more members; `head_of` is what `clusters` returns."""
    lines = []
    for head in dict.fromkeys(head_of.values()):
        others = [f"#{number}" for number, its in head_of.items() if its == head and number != head]
        if others:
            lines.append(
                f"#{head} is recommended over {', '.join(others)}: cheaper, and in {metric} not told "
                "apart on the test split (paired, 5% for each pair)"
            )
    return lines


def describe_optimism(optimism: Estimate | None, metric: str) -> str:
    """The bias of selection on the validation split in a sentence; empty where it is not known."""
    if optimism is None:
        return ""
    name = f"{metric}_difference"
    shown, _, unit = show(name, optimism.value).partition(" ")
    half = spread(name, optimism)
    if unit:
        text = f"{shown}{f' {half}' if half else ''} {unit}"
        return f"Selection made the front look better by {text} (validation less test, beyond the baseline's)"
    return f"Optimism of selection: {optimism.value:+.4g}{f' {half}' if half else ''} {metric}"
