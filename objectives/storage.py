"""The bytes of packed weights, by arithmetic: what `runners.files.packing` takes for a tensor in each of its forms.

All functions are for whole numbers, and for arrays of them as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..spaces.techniques.sparsify import pattern_of

# A whole number, or an array of them: for one weight, or for many at once.
Whole = Any


def dense_bytes(count: Whole, bits: Whole) -> Whole:
    """Numbers in a row without gaps."""
    return -(-count * bits // 8)


def ternary_bytes(count: Whole) -> Whole:
    """Numbers of {-1, 0, 1}, five to a byte."""
    return -(-count // 5)


def bitmap_bytes(count: Whole, bits: Whole, nonzero: Whole) -> Whole:
    """A bit for each number, then those that are not zero."""
    return dense_bytes(count, 1) + dense_bytes(nonzero, bits)


def position_bits(count: Whole, nonzero: Whole) -> Whole:
    """How many low bits of a position Elias and Fano write down: the binary logarithm of the mean gap, 8 at most.

    >>> int(position_bits(1000, 100)), int(position_bits(1000, 500))
    (3, 1)
    """
    gap = count // np.maximum(nonzero, 1)
    return np.minimum(np.frexp(gap)[1] - 1, 8)


def index_bytes(count: Whole, bits: Whole, nonzero: Whole) -> Whole:
    """The positions of the numbers that are not zero, by Elias and Fano, then those numbers."""
    low = position_bits(count, nonzero)
    return dense_bytes(nonzero, low) + dense_bytes(nonzero + (count - 1 >> low), 1) + dense_bytes(nonzero, bits)


def weight_bytes(count: Whole, bits: Whole, nonzero: Whole, affine: Any = False) -> Whole:
    """Bytes of a packed weight, in the way that takes the fewest (see `runners.files.packing`).

    affine: whether all `2^bits` codes are used, where it is one less: 2 bits are then not ternary.

    >>> [int(weight_bytes(1000, *level)) for level in ((3, 1000), (2, 900), (1, 1000), (8, 500), (4, 100))]
    [375, 200, 125, 625, 116]
    """
    few = np.less_equal(bits, 2) & np.logical_not(affine)
    value = np.where(few, 1, bits)  # a number of {-1, 1} is a bit
    dense = np.where(few & (nonzero < count), ternary_bytes(count), dense_bytes(count, value))
    sparse = np.minimum(bitmap_bytes(count, value, nonzero), index_bytes(count, value, nonzero))
    return np.minimum(dense, sparse)


def shared_bytes(count: Whole, bits: Whole, nonzero: Whole) -> Whole:
    """Bytes of indices, and of their codebook: a float32 for each, but no more than there are weights that differ.

    >>> int(shared_bytes(1000, 4, 1000)), int(shared_bytes(100, 8, 10))
    (564, 61)
    """
    sparse = np.minimum(bitmap_bytes(count, bits, nonzero), index_bytes(count, bits, nonzero))
    entries = np.minimum(2**bits, nonzero + (nonzero < count))
    return np.minimum(dense_bytes(count, bits), sparse) + 4 * entries


def nonzero_weights(count: Whole, inputs: Whole, zeros: float | str) -> Whole:
    """How many of `count` weights a mask leaves: all but a share, or those of a pattern along `inputs` input channels.

    >>> int(nonzero_weights(54, 6, 0.25)), int(nonzero_weights(54, 6, "2:4"))
    (40, 27)
    """
    return left_by_mask(count, inputs, *mask_numbers(zeros))


def mask_numbers(zeros: float | str) -> tuple[float, int, int]:
    """A choice of sparsity as numbers, the last three arguments of `left_by_mask`.

    >>> mask_numbers(0.3), mask_numbers("2:4")
    ((0.3, 0, 1), (0.0, 2, 4))
    """
    return (0.0, *pattern_of(zeros)) if isinstance(zeros, str) else (zeros, 0, 1)


def left_by_mask(count: Whole, inputs: Whole, share: Any, keep: Whole, of: Whole) -> Whole:
    """`nonzero_weights` of zeros that are a share, with `keep` 0, or a pattern `keep:of`."""
    anywhere = count - np.rint(count * share).astype(np.int64)
    in_pattern = count // inputs * (inputs // of * keep - (-(inputs % of) * keep // of))
    return np.where(np.equal(keep, 0), anywhere, in_pattern)
