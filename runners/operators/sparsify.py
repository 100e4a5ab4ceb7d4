"""Sparsity: masks of weights that become zero, anywhere in a layer or in a pattern N:M.

In a pattern, of every M neighbouring input channels (at the same position of a convolution's kernel) N stay, which is
what sparse matrix units read. Of what is left over at the end, r < M channels, `ceil(r N / M)` stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...spaces.techniques.sparsify import pattern_of
from .layers import INPUT, as_matrix, from_matrix


def magnitude_mask(weight: Tensor, ratio: float) -> Tensor:
    """1 for the weights that stay, 0 for exactly `round(ratio * n)` of smallest magnitude; of equal ones the first go.

    Example:
        >>> magnitude_mask(torch.tensor([[3.0, -1.0], [0.5, 2.0]]), 0.5).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return mask_of(weight.detach().abs(), ratio)


def mask_of(scores: Tensor, ratio: float, pattern: str = "") -> Tensor:
    """1 for the weights of the highest scores, 0 for exactly `round(ratio * n)` others, or as the pattern says.

    Args:
        scores: Output-first, as the weight; of equal scores the first become zero.
        ratio: The share of zeros.
        pattern: `N:M`, or "".

    Returns:
        The mask, as the scores.

    Example:
        >>> mask_of(torch.tensor([[4.0, 3.0, 1.0, 2.0, 1.0, 2.0, 3.0, 5.0]]), 0.5, "2:4").tolist()
        [[1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]]
    """
    if pattern:
        keep, of = pattern_of(pattern)
        last = scores.movedim(INPUT, -1)  # input channels side by side
        parts = [_least(part, part.shape[-1] - -(-part.shape[-1] * keep // of)) for part in torch.split(last, of, -1)]
        mask = torch.cat(parts, -1)
        return mask.movedim(-1, INPUT).contiguous()
    return _least(scores.reshape(1, -1), round(scores.numel() * ratio)).view_as(scores)


def growing_mask(weight: Tensor, count: int, pattern: str, grown: float) -> Tensor:
    """The mask at one moment of gradual sparsity: the `round(grown * count)` smallest weights are 0.

    Args:
        weight: Output-first.
        count: The number of zeros at the end.
        pattern: `N:M`, or ""; only weights become zero that the pattern would remove now.
        grown: The share of the final zeros that are zero already, 0 to 1.

    Returns:
        The mask, as the weight.

    Example:
        >>> weight = torch.tensor([[4.0, 3.0, 1.0, 2.0, 1.0, 2.0, 3.0, 5.0]])
        >>> for grown in (0.5, 1.0):
        ...     growing_mask(weight, 4, "2:4", grown).tolist()[0]
        [1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0]
        [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    """
    scores = weight.detach().abs()
    last = mask_of(scores, count / scores.numel(), pattern)
    return _least(scores.where(last == 0, torch.inf).reshape(1, -1), round(grown * count)).view_as(scores)


def cubic(done: float) -> float:
    """The share of the final zeros that are there at `done` (0..1) of the ramp (Zhu & Gupta 2017, equation 1, from
    none).

    >>> cubic(0.0), cubic(0.5), cubic(1.0)
    (0.0, 0.875, 1.0)
    """
    return 1 - (1 - done) ** 3


def _least(scores: Tensor, count: int) -> Tensor:
    """0 for the `count` least of each row, 1 for the others."""
    gone = torch.argsort(scores, dim=-1, stable=True)[..., :count]
    return torch.ones_like(scores).scatter(-1, gone, 0.0)


def activation_scores(weight: Tensor, hessian: Tensor) -> Tensor:
    """Wanda (Sun et al., ICLR 2024): a weight's magnitude times the norm of the input that it is multiplied with.

    The paper compares the weights of one output; here those of the whole layer are compared, as for the other
    criteria: 80.3% instead of 78.6% on 2,000 test images (ResNet-20 on CIFAR-10, 70% zeros, BatchNorm re-estimated).
    """
    return weight.detach().abs() * input_norms(weight, hessian)


def input_norms(weight: Tensor, hessian: Tensor) -> Tensor:
    """For each weight the norm of the input that it is multiplied with, over all calibration images; as the weight."""
    norms = hessian.diagonal(dim1=-2, dim2=-1).sqrt().to(weight)
    return from_matrix(norms[:, None].expand_as(as_matrix(weight, len(hessian))), weight.shape)


def random_scores(weight: Tensor, seed: int) -> Tensor:
    """Uniform random scores, as the weight."""
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
