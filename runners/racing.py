"""Races: the evaluation of a candidate that is significantly worse than a rival is stopped early.

The sampler still needs a score for such a candidate, and its score on the first images is biased, because those may be
easier than the rest. So the sampler is told the rival's score on all images, less the paired difference on the images
that both have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import Stopped
from ..objectives.display import is_rate, show
from ..objectives.measurement import Z95, Estimate
from ..objectives.paired import difference
from .evaluate import Watch


@dataclass(frozen=True)
class Rival:
    """A candidate that another one must not be significantly worse than.

    Args:
        name: For people, such as `#12`.
        scores: Its metric on every validation sample.
        margin: By how much a candidate may be worse.
        losses: Its values in the other objectives, lower is better. It is a rival only of candidates that are no better
            in any of them; empty: of all candidates.
    """

    name: str
    scores: NDArray[np.floating]
    margin: float = 0.0
    losses: tuple[float, ...] = ()


def race(rivals: Callable[[], Sequence[Rival]], metric: str) -> Watch:
    """A watcher of an evaluation that raises `Stopped` when the candidate is significantly worse than a rival.

    Args:
        rivals: Gives the rivals; called once, when the first scores are there.
        metric: The name of the metric, for the message.

    >>> watch = race(lambda: [Rival("#3", np.ones(1000))], "accuracy")
    >>> watch(np.r_[np.zeros(300), np.ones(20)])
    Traceback (most recent call last):
    paretorch.errors.Stopped: accuracy 6.25% after 320 images, where #3 has 100.00%: worse beyond doubt
    """
    asked: list[Sequence[Rival]] = []

    def watch(scores: NDArray[np.float64]) -> None:
        if not asked:
            asked.append(rivals())
        for rival in asked[0]:
            gap = difference(rival.scores, scores)
            if not gap.surely_above(rival.margin):
                continue
            value, half = float(np.mean(rival.scores)) - gap.value, Z95 * gap.error
            here = float(np.mean(rival.scores[: gap.n]))
            amount = f"{100 * rival.margin:.3g} points" if is_rate(metric) else f"{rival.margin:.3g}"
            by = f" by more than {amount}" if rival.margin else ""
            raise Stopped(
                f"{metric} {show(metric, float(scores.mean()))} after {len(scores)} images, where {rival.name} has "
                f"{show(metric, here)}: worse{by} beyond doubt",
                Estimate(value, value - half, value + half, gap.n),
            )

    return watch
