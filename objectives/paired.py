"""Two networks on the same samples: is one of them worse, for all that is known so far?

Both see the same images in the same order, so their scores are compared image by image. That takes out what makes some
images hard for everybody, which is most of the variance: 500 images tell two networks apart that 5,000 would not if each
saw its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Standard errors by which a candidate must be worse to be given up. A study looks half a dozen times at every candidate,
# against a dozen others; 4 standard errors (p = 3e-5) keep the chance of a wrong end below 1 in 400 for all of it.
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
