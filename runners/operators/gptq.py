"""GPTQ: weights are rounded one input after the other, and the inputs that follow compensate the error of each.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, ICLR 2023; the same greedy step as OBQ (Frantar & Alistarh 2022) in an order
that is the same for all rows, so that one Cholesky factor serves them all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .hessian import better, inverse_factor
from .layers import as_matrix, from_matrix, per_output
from .quantize import codes, rounded

_COLUMNS = 128  # rounded before what follows is brought up to date: the same numbers, fewer passes over memory


@torch.no_grad()
def gptq(
    weight: Tensor,
    scale: Tensor,
    bits: int,
    hessian: Tensor,
    mask: Tensor | None = None,
    act_order: bool = True,
    zero: int | None = None,
) -> Tensor:
    """Round a weight to the grid `scale * codes` with a small error of the layer's outputs.

    No row has a larger error than nearest rounding gives it: where the greedy order does worse, nearest rounding is
    used.

    Args:
        weight: Output-first.
        scale: `[outputs]`, or in a shape that broadcasts over the weight.
        bits: The width of the codes.
        hessian: `[groups, inputs, inputs]`.
        mask: 1 and 0, as the weight; weights with 0 stay zero, and their error is compensated too.
        act_order: Whether inputs of the largest norm are rounded first.
        zero: The zero point, as for `codes`.

    Returns:
        The rounded weight, as the weight.

    Example:
        >>> weight, x = torch.randn(8, 16), torch.randn(16, 4) @ torch.randn(4, 500)
        >>> scale = weight.abs().amax(1) / 3
        >>> near, ours = codes(weight, scale, 3) * scale[:, None], gptq(weight, scale, 3, (x @ x.T)[None])
        >>> bool(((ours - weight) @ x).norm() < ((near - weight) @ x).norm())
        True
    """
    groups, inputs = len(hessian), hessian.shape[-1]
    order = torch.arange(inputs).expand(groups, -1)
    if act_order:
        order = torch.argsort(hessian.diagonal(dim1=-2, dim2=-1), dim=-1, descending=True, stable=True)
    across, down = order[:, None, :], order[:, :, None]
    permuted = hessian.gather(1, down.expand_as(hessian)).gather(2, across.expand_as(hessian))
    factor = inverse_factor(permuted)

    target = as_matrix(weight, groups)
    left = target.double().gather(2, across.expand_as(target))
    keep = None if mask is None else as_matrix(mask, groups).gather(2, across.expand_as(target))
    wide = (per_output(scale, weight) if scale.ndim == 1 else scale).expand_as(weight)
    steps = as_matrix(wide, groups).double().gather(2, across.expand_as(target))
    on_grid = torch.zeros_like(left)
    for start in range(0, inputs, _COLUMNS):
        end = min(start + _COLUMNS, inputs)
        errors = torch.zeros_like(left[..., start:end])
        for j in range(start, end):
            column = rounded(left[..., j], steps[..., j], bits, zero)
            on_grid[..., j] = column if keep is None else column * keep[..., j]
            errors[..., j - start] = (left[..., j] - on_grid[..., j]) / factor[:, None, j, j]
            left[..., j:end] -= errors[..., j - start, None] * factor[:, None, j, j:end]
        left[..., end:] -= torch.bmm(errors, factor[:, start:end, end:])
    solved = torch.zeros_like(target).scatter(2, across.expand_as(target), on_grid.to(weight.dtype))
    near = codes(weight, scale, bits, zero) * wide
    near = as_matrix(near if mask is None else near * mask, groups)
    return from_matrix(better(near, solved, target, hessian), weight.shape)
