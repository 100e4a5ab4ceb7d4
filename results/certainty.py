"""What the numbers of a front can and cannot tell: clusters of members that no test separates, and the optimism of
selection.

Everything here takes members and scores, not a `Front`, which stands above this module.
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
    """Members that nothing tells apart: by a member's number that of the cheapest one of its cluster.

    From the cheapest member on, each joins the first cluster whose cheapest member it has no advantage over: the paired
    95% interval of their metrics on the test split holds zero or less, and the other costs that are objectives are not
    lower (a latency: its interval does not lie below). Else it begins a cluster of its own. So the cheapest one of a
    cluster can stand for all of it. The cheapest is the smallest in bytes; where these are no objective, that with the
    lowest first cost.

    The level is 5% for each pair, on purpose not corrected for the number of pairs: a correction makes larger clusters,
    and the mistake that costs something is to recommend a worse file as equal.

    Args:
        members: The members of a front.
        scores: By number, a member's metric on every test sample. Members that are not in it are in no cluster, nor are
            those whose file is not what was simulated.
        costs: The costs among the objectives.
        maximize: Whether more of the metric is better.
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
    """A cost of a measured candidate, the latency as a finalist where it was timed as one."""
    assert member.measurement is not None
    return member.test.get(name) or member.measurement.metrics[name]


def _cheaper(member: Candidate, head: Candidate, costs: Sequence[str]) -> bool:
    return any(_cost(member, name).high < _cost(head, name).low for name in costs)


def optimism(
    losses: Sequence[float], validation: Sequence[Scores | None], test: Sequence[Scores | None]
) -> Estimate | None:
    """By how much the members lost more than the baseline from the validation to the test split, on average.

    Above zero selection has made them look better than they are. The 95% interval is normal: the two splits are
    independent, and on each of them every member meets the same samples.

    Args:
        losses: Of each member, its metric's loss from validation to test less the baseline's.
        validation: The scores on the validation split, the baseline's first, then each member's.
        test: The same on the test split. Without all scores there is no interval.

    Returns:
        None without members.
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
    """For people, a line for each cluster of several members; `head_of` is what `clusters` gives."""
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
    """For people: what selection on the validation split has made of the numbers there; empty when it is not known."""
    if optimism is None:
        return ""
    name = f"{metric}_difference"
    shown, _, unit = show(name, optimism.value).partition(" ")
    half = spread(name, optimism)
    if unit:
        text = f"{shown}{f' {half}' if half else ''} {unit}"
        return f"Selection made the front look better by {text} (validation less test, beyond the baseline's)"
    return f"Optimism of selection: {optimism.value:+.4g}{f' {half}' if half else ''} {metric}"
