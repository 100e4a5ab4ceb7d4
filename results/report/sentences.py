"""The sentences of a report: marks, verdicts and warnings.

Only this module and `view` check whether members can be distinguished and whether files passed the parity check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...objectives.display import against, is_rate, show
from ...objectives.measurement import Estimate
from ...objectives.objective import COSTS
from ..candidate import FAILED, OK, OVER_BUDGET, STOPPED, Candidate
from ..front import Front
from ..parity import parity_failure
from .cells import beside, final, heading, measured

SENSITIVITY = "How far the outputs move when one layer alone is compressed, without training."


def marks(front: Front, member: Candidate) -> tuple[str, ...]:
    """The marks after a member's recipe in a table: `knee`, `recommended`, `like #3`, `not what was simulated`."""
    words = ["knee"] if member.number == front.knee().number else []
    heads = list(front.clusters.values())
    head = front.clusters.get(member.number)
    if head == member.number and heads.count(head) > 1:
        words.append("recommended")
    elif head not in (None, member.number):
        words.append(f"like #{head}")
    if parity_failure(member):
        words.append("not what was simulated")
    return tuple(words)


def pick(front: Front) -> str:
    """The candidate to export by default, as `--pick` takes it.

    It is the recommended member where the test split was used, else the knee; where the front is empty, the candidate
    that misses the budget by the least.
    """
    if front.members:
        return "recommended" if front.clusters else "knee"
    closest = front.least_violating(1)
    return str(closest[0].number) if closest else "NUMBER"


def warnings(front: Front) -> tuple[str, ...]:
    """Which members are slower than the baseline, and which files do not compute what was simulated."""
    slower = [f"#{m.number}" for m in front.members if front.speed(m) == "slower"]
    lines = [f"Slower than the original model: {', '.join(slower)}"] if slower else []
    failures = [(m.number, parity_failure(m)) for m in front.members]
    return (*lines, *(f"#{number} is not what was simulated: {why}" for number, why in failures if why))


def summary(front: Front, costs: Sequence[str], states: Mapping[str, int]) -> str:
    """How many candidates were tried, and how the knee compares with the baseline (in bold, `**`)."""
    ok, over, stopped, failed = (states.get(state, 0) for state in (OK, OVER_BUDGET, STOPPED, FAILED))
    tried = f"{len(front.candidates)} candidates: {ok} inside the budget, {over} over it, {failed} failed."
    if stopped:
        tried = f"{tried[:-1]}, {stopped} stopped early as significantly worse."
    if not front.members:
        return f"{tried} **No candidate kept the budget.**"
    knee, numbers = front.knee(), []
    for name in (front.quality, *costs):
        if (estimate := final(knee, name)) is not None:
            numbers.append(f"{heading(name)} {show(name, estimate.value)} ({beside(front, knee, name)})")
    return f"{tried} The knee of the front is **#{knee.number}: {', '.join(numbers)}**."


def certainty(front: Front, clusters: Sequence[str], warnings: Sequence[str]) -> tuple[str, ...]:
    """What the numbers cannot tell: members that cannot be distinguished, the bias of the selection, warnings."""
    quality, lines = front.quality, []
    if front.clusters:
        lines += [f"{line}." for line in clusters]
        if any(f"{quality}_difference" in m.test for m in front.members):
            lines.append(
                "Differences to the baseline on the test split are between the same samples, "
                "with 95% intervals for pairs."
            )
    elif alike := _overlapping(front):
        lines.append(alike)
    if (cost := front.optimism()) is not None:
        lines.append(_selection(quality, cost))
    return (*lines, *(f"{line}." for line in warnings))


def _overlapping(front: Front) -> str:
    """The members whose 95% interval on the validation split overlaps the best one's; empty where there is none."""
    numbers = [(m, e) for m in front.members if (e := measured(m, front.quality)) is not None]
    if not numbers:
        return ""
    sign = 1.0 if front.maximizes(front.quality) else -1.0
    best, top = max(numbers, key=lambda pair: sign * pair[1].value)
    alike = [f"#{m.number}" for m, e in numbers if m is not best and e.low <= top.high and top.low <= e.high]
    if not alike:
        return ""
    return (
        f"In {front.quality} {', '.join(alike)} cannot be told apart from the best, #{best.number}: the 95% "
        "intervals overlap. Among these the cheaper one is the better choice."
    )


def _selection(quality: str, cost: Estimate) -> str:
    """The bias of the selection: how much more than the baseline the members lost from validation to test."""
    scale = 100 if is_rate(quality) else 1
    amount = f"{scale * abs(cost.value):.2f} points" if is_rate(quality) else f"{abs(cost.value):.3g}"
    interval = ""
    if cost.low < cost.high:
        interval = f" (95% interval {scale * cost.low:+.3g} to {scale * cost.high:+.3g})"
    than = f"{amount} {'more' if cost.value > 0 else 'less'}"
    return (
        "Candidates were chosen on the validation images. From there to the test images, used once, the "
        f"members lost {than} than the baseline, on average{interval}. Trust the test column."
    )


def beaten(front: Front, trivial: Candidate) -> str:
    """How a reference recipe compares with the front: the member that is better in every objective, and by how much."""
    theirs = trivial.measurement
    if theirs is None or trivial.state != OK:
        return trivial.reason or trivial.state.replace("_", " ")
    if trivial.number in {member.number for member in front.members}:
        return "on the front: search found nothing better in every objective"
    losses = front.losses(trivial)
    better = [m for m in front.members if all(a <= b for a, b in zip(front.losses(m), losses, strict=True))]
    if not better:
        return "as good as a member of the front"
    best = min(better, key=lambda m: sum(front.losses(m)))
    assert best.measurement is not None  # a member was measured
    gains = [_gain(o.metric, best.measurement.metrics[o.metric], theirs.metrics[o.metric]) for o in front.objectives]
    differences = ", ".join(gain for gain in gains if gain)
    return f"beaten by #{best.number}" + (f": {differences}" if differences else "")


def _gain(metric: str, ours: Estimate, theirs: Estimate) -> str:
    """How much better a member is than a reference recipe in one objective; empty where they are equal."""
    if ours.value == theirs.value:
        return ""
    if metric in COSTS and theirs.value:
        gain = f"{100 * (ours.value / theirs.value - 1):+.0f}%"
    else:
        gain = against(metric, ours, theirs)
    noise = "" if ours.low > theirs.high or ours.high < theirs.low else " (within the intervals)"
    return f"{heading(metric)} {gain}{noise}"
