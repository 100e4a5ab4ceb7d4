"""Races: a candidate whose evaluation cannot end well is given up before its end.

The sampler must still learn what such a candidate is worth, and what it scored on the first images is no good answer:
those may have been easy. So it is told its rival's score over all images, less the difference on the images that both
have seen: what is said to be worse then also looks worse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import Stopped
from ..objectives.display import show
from ..objectives.measurement import Z95, Estimate
from ..objectives.paired import difference
from ..runners.evaluate import Watch


@dataclass(frozen=True)
class Rival:
    """What a candidate must not be beyond doubt worse than by more than `margin`: its name, and a score per sample."""

    name: str
    scores: NDArray[np.floating]
    margin: float = 0.0


def race(rivals: Callable[[], Sequence[Rival]], metric: str) -> Watch:
    """A watcher of an evaluation that raises `Stopped` when a rival is surely better; `rivals` is asked once, late.

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
            found = difference(rival.scores, scores)
            if not found.surely_above(rival.margin):
                continue
            value, half = float(np.mean(rival.scores)) - found.value, Z95 * found.error
            here = float(np.mean(rival.scores[: found.n]))
            by = f" by more than {100 * rival.margin:.3g} points" if rival.margin else ""
            raise Stopped(
                f"{metric} {show(metric, float(scores.mean()))} after {len(scores)} images, where {rival.name} has "
                f"{show(metric, here)}: worse{by} beyond doubt",
                Estimate(value, value - half, value + half, found.n),
            )

    return watch
