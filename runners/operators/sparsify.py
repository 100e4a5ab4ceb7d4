"""Sparsity: which weights are set to zero, of a whole layer or in a pattern N:M.

In a pattern, of every M neighbouring input channels (at the same position of a convolution's kernel) N stay, which is what
sparse matrix units read. Of what is left over at the end, r < M channels, `ceil(r N / M)` stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...spaces.techniques.sparsify import pattern_of
from .hessian import rows


def magnitude_mask(weight: Tensor, ratio: float) -> Tensor:
    """1 for the weights that stay, 0 for exactly `round(ratio * n)` of least magnitude; of equal ones the first go.

    >>> magnitude_mask(torch.tensor([[3.0, -1.0], [0.5, 2.0]]), 0.5).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    return mask_of(weight.detach().abs(), ratio)


def mask_of(scores: Tensor, ratio: float, pattern: str = "") -> Tensor:
    """1 for the weights of the highest scores, 0 for exactly `round(ratio * n)` others, or as the pattern says.

    scores: as the weight, `[output, input, ...]`. Of equal ones the first go.

        >>> mask_of(torch.tensor([[4.0, 3.0, 1.0, 2.0, 1.0, 2.0, 3.0, 5.0]]), 0.5, "2:4").tolist()
        [[1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]]
    """
    if pattern:
        keep, of = pattern_of(pattern)
        last = scores.movedim(1, -1)  # input channels side by side
        found = torch.cat([_least(part, part.shape[-1] - -(-part.shape[-1] * keep // of)) for part in last.split(of, -1)], -1)  # type: ignore[no-untyped-call]  # fmt: skip
        return found.movedim(-1, 1).contiguous()
    return _least(scores.reshape(1, -1), round(scores.numel() * ratio)).view_as(scores)


def growing_mask(weight: Tensor, count: int, pattern: str, grown: float) -> Tensor:
    """The mask of a moment of gradual sparsity: the smallest weights, `round(grown * count)` of them, are 0.

    count: how many are in the end. In a pattern only those become zero that the pattern would now take.

        >>> weight = torch.tensor([[4.0, 3.0, 1.0, 2.0, 1.0, 2.0, 3.0, 5.0]])
        >>> [growing_mask(weight, 4, "2:4", grown).tolist()[0] for grown in (0.0, 0.5, 1.0)]  # doctest: +NORMALIZE_WHITESPACE
        [[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0],
         [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]]
    """
    scores = weight.detach().abs()
    last = mask_of(scores, count / scores.numel(), pattern)
    return _least(scores.where(last == 0, torch.inf).reshape(1, -1), round(grown * count)).view_as(scores)


def cubic(done: float) -> float:
    """The share of the final zeros that are there at `done` (0..1) of the ramp (Zhu & Gupta 2017, equation 1, from none).

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

    The paper compares the weights of one output. We compare those of the whole layer, as for the other criteria: 80.3% instead of
    78.6% on 2,000 test images (ResNet-20 on CIFAR-10, 70% zeros, BatchNorm re-estimated).
    """
    return weight.detach().abs() * input_norms(weight, hessian)


def input_norms(weight: Tensor, hessian: Tensor) -> Tensor:
    """Of each weight the norm, over all calibration images, of the input that it is multiplied with; as the weight."""
    norms = hessian.diagonal(dim1=-2, dim2=-1).sqrt().to(weight)
    return norms[:, None].expand_as(rows(weight, len(hessian))).reshape(weight.shape)


def random_scores(weight: Tensor, seed: int) -> Tensor:
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
