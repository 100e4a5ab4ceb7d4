"""Unstructured sparsity: which weights are set to zero."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude_mask(weight: Tensor, ratio: float) -> Tensor:
    """1 for the weights that stay, 0 for exactly `round(ratio * n)` of least magnitude; of equal ones the first go.

    >>> magnitude_mask(torch.tensor([[3.0, -1.0], [0.5, 2.0]]), 0.5).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    flat = weight.detach().abs().flatten()
    mask = torch.ones_like(flat)
    mask[torch.argsort(flat, stable=True)[: round(len(flat) * ratio)]] = 0
    return mask.view_as(weight)
