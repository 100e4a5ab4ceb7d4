"""Two networks on the same samples: is one of them worse, for all that is known so far?

Both see the same images in the same order, so their scores are compared image by image. That takes out what makes some
images hard for everybody, which is most of the variance: 500 images tell two networks apart that 5,000 would not if
each saw its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .measurement import Z95, Estimate

# Standard errors by which a candidate must be worse to be given up. A study looks half a dozen times at every
# candidate, against a dozen others; 4 standard errors (p = 3e-5) keep the chance of a wrong end below 1 in 400 for all
# of it.
SURE = 4.0
FIRST = 256  # samples before the first look


@dataclass(frozen=True)
class Difference:
    """A mean difference of scores, its standard error, and the number of samples it rests on."""

    value: float
    error: float
    n: int

    def surely_above(self, margin: float = 0.0) -> bool:
        """Whether the difference is larger than the margin, beyond doubt."""
        return self.n >= FIRST and self.value - margin > SURE * self.error


def difference(better: NDArray[np.floating], worse: NDArray[np.floating]) -> Difference:
    """By how much the first scores more than the second, over the samples that both have seen (each from the first on).

    The standard error is never below that of one sample of `n` whose scores differ by 1 or by the largest difference:
    where all samples agree so far, the next one may not.

    >>> difference(np.ones(400), np.zeros(300))
    Difference(value=1.0, error=0.0033333333333333335, n=300)
    """
    n = min(len(better), len(worse))
    if not n:
        return Difference(0.0, math.inf, 0)
    d = np.asarray(better[:n], dtype=np.float64) - np.asarray(worse[:n], dtype=np.float64)
    largest = float(np.abs(d).max())
    error = max(float(d.std()) / math.sqrt(n), largest / n)
    return Difference(float(d.mean()), error, n)


def paired(scores: NDArray[np.floating], others: NDArray[np.floating]) -> Estimate:
    """The mean of the first scores less that of the others on the same samples, with a 95% interval for pairs.

    `[n]`, `[n]`. Where all scores are 0 or 1, the interval is that of Bonett & Price (2012, "Adjusted Wald confidence
    interval for a difference of binomial proportions based on paired data"): it rests on the samples that only one of
    the two gets right, one more of either kind, and recommended for few of them (Fagerland, Lydersen & Laake 2014). Its
    exact coverage is 95% or more wherever `tests/objectives/test_paired.py` looks. Other scores get a normal interval.
    Raises `ValueError` for scores of different samples.

    >>> metric = paired(np.array([1, 1, 1, 0] * 25), np.array([1, 1, 0, 0] * 25))
    >>> metric.value, round(metric.low, 3), round(metric.high, 3)
    (0.25, 0.157, 0.333)
    """
    if scores.shape != others.shape or scores.ndim != 1 or not len(scores):
        raise ValueError(f"scores of the shapes {scores.shape} and {others.shape} are no pairs")
    a, b = np.asarray(scores, dtype=np.float64), np.asarray(others, dtype=np.float64)
    d, n = a - b, len(a)
    if not (((a == 0) | (a == 1)) & ((b == 0) | (b == 1))).all():
        return Estimate.mean(float(d.sum()), float((d * d).sum()), n)
    more, less = (float((d == sign).sum() + 1) / (n + 2) for sign in (1, -1))
    centre, half = more - less, Z95 * math.sqrt((more + less - (more - less) ** 2) / (n + 2))
    value = float(d.mean())
    return Estimate(value, max(-1.0, min(value, centre - half)), min(1.0, max(value, centre + half)), n)
