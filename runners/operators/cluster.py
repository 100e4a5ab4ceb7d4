"""Weights that share few values: a codebook per layer, and an index into it per weight (Han et al., ICLR 2016).

What is shared is found by k-means in one dimension. A parametrization shows the network the codebook's values and
trains these, with the assignment fixed: the gradient of a value is the sum over the weights that have it, over their
number, which is the step that those weights would take together if each were trained by itself.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ...spaces.steps import Step
from .frozen import FrozenWeight

_CELLS = 2048
_ROUNDS = 300


def kmeans(values: NDArray[np.floating], count: int) -> NDArray[np.float64]:
    """At most `count` centroids of numbers in a row, ascending, with the least sum of squared distances to the nearest.

    In one dimension a cluster is an interval, so the optimum is a dynamic programme over where intervals end (Wang &
    Song, The R Journal 2011). It is exact for up to 2048 distinct numbers; more are first put into as many cells, and
    Lloyd's algorithm on all of them finishes the work. No randomness.

        >>> kmeans(np.array([0.0, 0.1, 5.0, 5.1, 9.0]), 3).round(2).tolist()
        [0.05, 5.05, 9.0]
    """
    ordered = np.sort(values.ravel()).astype(np.float64)
    first = np.flatnonzero(np.diff(ordered, prepend=-np.inf))  # of equal numbers
    if len(first) <= count:
        return np.asarray(ordered[first])
    ends = np.append(first, len(ordered))
    if len(first) > _CELLS:  # half of the cells hold as many numbers each, half are as wide, for the tails' sake
        even = np.searchsorted(ordered, np.linspace(ordered[0], ordered[-1], _CELLS // 2 + 1)[1:-1])
        ends = np.unique(np.concatenate([ends[:: -(-len(ends) // (_CELLS // 2))], even, [0, len(ordered)]]))
    shifted = ordered - ordered.mean()  # so that differences of running sums keep their digits
    sums, squares = (np.concatenate([[0.0], np.cumsum(x)]) for x in (shifted, shifted**2))
    cuts = np.unique(ends[_intervals(ends, sums[ends], squares[ends], count)])
    for _ in range(_ROUNDS if len(first) > _CELLS else 0):
        centroids = np.diff(sums[cuts]) / np.diff(cuts)
        inner = np.searchsorted(shifted, (centroids[1:] + centroids[:-1]) / 2)
        moved = np.unique([0, *inner, len(ordered)])  # an interval that nothing is left of goes
        if np.array_equal(moved, cuts):
            break
        cuts = moved
    centres: NDArray[np.float64] = np.diff(sums[cuts]) / np.diff(cuts) + ordered.mean()
    return centres


def _intervals(
    sizes: NDArray[np.intp], sums: NDArray[np.float64], squares: NDArray[np.float64], count: int
) -> NDArray[np.intp]:
    """Where the `count` best intervals of cells begin and end, from running sums over the cells.

    The best begin of the last interval moves to the right with its end. So it is found for every other end between
    those of its neighbours, then for the ends between: n log n sums of squares per interval, not n^2.
    """
    last = len(sizes) - 1

    def within(begin: NDArray[np.intp], end: NDArray[np.intp]) -> NDArray[np.float64]:
        total = sums[end] - sums[begin]
        costs: NDArray[np.float64] = squares[end] - squares[begin] - total**2 / np.maximum(sizes[end] - sizes[begin], 1)
        return costs

    every = np.arange(last + 1)
    least = within(np.zeros_like(every), every)
    begins = []
    for _ in range(count - 1):
        best, begin = np.zeros(last + 1), np.zeros(last + 2, dtype=np.intp)
        begin[last + 1] = last
        step = 1 << (last.bit_length() - 1)
        while step:
            end = np.arange(step, last + 1, 2 * step)
            low, high = begin[end - step], np.minimum(begin[np.minimum(end + step, last + 1)], end)
            widths = high - low + 1
            starts = np.cumsum(widths) - widths
            tried = np.arange(int(widths.sum())) + np.repeat(low - starts, widths)
            total = least[tried] + within(tried, np.repeat(end, widths))
            best[end] = np.minimum.reduceat(total, starts)
            hits = np.flatnonzero(total == np.repeat(best[end], widths))
            begin[end] = tried[hits[np.searchsorted(hits, starts)]]
            step //= 2
        begins.append(begin)
        least = best
    cuts = [last]
    for begin in reversed(begins):
        cuts.append(int(begin[cuts[-1]]))
    return np.array([0, *cuts[::-1]], dtype=np.intp)


@torch.no_grad()
def shared(weight: Tensor, bits: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`(indices, codebook)` of a weight: at most `2^bits` values, and for each weight the number of the nearest one.

    indices: uint8, as the weight. codebook: `[values]`, of the weight's type, ascending. With a mask (1 and 0, as the
    weight) the first value is 0, for all weights that are masked and for no other.

        >>> indices, codebook = shared(torch.tensor([[0.1, 5.0], [5.2, 0.3]]), 1)
        >>> indices.tolist(), codebook.tolist()
        ([[0, 1], [1, 0]], [0.20000000298023224, 5.099999904632568])
    """
    numbers = weight.detach().cpu().numpy()
    kept = numbers if mask is None else numbers[mask.cpu().numpy() > 0]
    codebook = kmeans(kept, 2**bits - (mask is not None))
    nearest = np.searchsorted((codebook[1:] + codebook[:-1]) / 2, kept).astype(np.uint8)
    indices = nearest
    if mask is not None:
        indices = np.zeros(numbers.shape, np.uint8)
        indices[mask.cpu().numpy() > 0] = nearest + 1
        codebook = np.concatenate([[0.0], codebook])
    return torch.from_numpy(indices).to(weight.device), torch.from_numpy(codebook).to(weight)


class SharedWeights(nn.Module):
    """A parametrization that shows `codebook[indices]` and trains the codebook; with `zero` its first value stays 0."""

    def __init__(self, indices: Tensor, codebook: Tensor, bits: int, *, zero: bool) -> None:
        super().__init__()
        self.bits, self.zero = bits, zero
        self.register_buffer("indices", indices)
        self.register_buffer("counts", torch.bincount(indices.flatten(), minlength=len(codebook)).to(codebook))
        self.values = nn.Parameter(codebook[int(zero) :].clone())
        self.indices: Tensor
        self.counts: Tensor

    def codebook(self) -> Tensor:
        """All values, the fixed zero among them."""
        return F.pad(self.values, (int(self.zero), 0))

    def forward(self, weight: Tensor) -> Tensor:
        codebook = self.codebook()
        fixed = codebook.detach()
        codebook = fixed + (codebook - fixed) / self.counts.clamp_min(1)  # the same numbers, the mean of the gradients
        return codebook.index_select(0, self.indices.flatten().int()).view_as(weight)

    def frozen(self, weight: Tensor, step: Step | None) -> tuple[Tensor, FrozenWeight | None]:
        """See `frozen.Freezable`; the weight that is trained is the codebook, whatever `weight` says."""
        codebook = self.codebook().detach().clone()
        whole = codebook.index_select(0, self.indices.flatten().int()).view_as(weight)
        return whole, FrozenWeight(self.bits, codes=self.indices.float(), codebook=codebook)
