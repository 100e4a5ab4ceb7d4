"""Paired comparison of two networks on the same samples: is one of them significantly worse?

Both are evaluated on the same images in the same order, so their scores are compared image by image. That removes the
variance between easy and hard images, which is most of the variance: 500 shared images can distinguish two networks
that 5,000 separate images for each could not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .measurement import Z95, Estimate

# A candidate is stopped early when it is worse by this many standard errors. A study tests every candidate about six
# times against about twelve others; with 4 standard errors (p = 3e-5) the probability that any of these tests is wrong
# stays below 1 in 400.
SURE = 4.0
FIRST = 256  # samples before the first test


@dataclass(frozen=True)
class Difference:
    """A mean difference of scores.

    Args:
        value: The mean.
        error: Its standard error.
        n: The number of samples.
    """

    value: float
    error: float
    n: int

    def surely_above(self, margin: float = 0.0) -> bool:
        """Whether the difference is significantly larger than the margin; never with fewer than `FIRST` samples."""
        return self.n >= FIRST and self.value - margin > SURE * self.error


def difference(better: NDArray[np.floating], worse: NDArray[np.floating]) -> Difference:
    """The mean of the first scores less the second, over the samples that both were evaluated on.

    Both start at the first sample, and the longer one is cut. The standard error is at least that of a single sample of
    `n` whose scores differ by 1 or by the largest difference: where all samples agree so far, the next one may not.

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

    Where all scores are 0 or 1, the interval is that of Bonett & Price (2012, "Adjusted Wald confidence interval for a
    difference of binomial proportions based on paired data"). It is computed from the number of samples that only one
    of the two gets right, plus one of each kind, and is recommended where there are few such samples (Fagerland,
    Lydersen & Laake 2014). Its exact coverage is at least 95% in all cases of `tests/objectives/test_paired.py`. Other
    scores get a normal interval.

    Args:
        scores: `[n]`, one score per sample.
        others: `[n]`, the scores of the other network on the same samples.

    Raises:
        ValueError: The scores have different lengths.

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
