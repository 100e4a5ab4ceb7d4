"""Optimal brain surgeon: zeros chosen by what they cost after the other weights have made good for them.

SparseGPT (Frantar & Alistarh, ICML 2023) goes over the inputs once, with one Cholesky factor for all rows, and lets only
the inputs that follow make good for a zero. That gives a first mask. Then the weights that stay are solved for, of all
weights with these zeros those of least output error, and some zeros change places with others that now cost less (iterative
hard thresholding, Blumensath & Davies 2009). On layers of ResNet-20, at 50 to 90% zeros, that leaves 1% to 53% of the output
error of zeros by magnitude; the exchange takes off up to a half of it at 90%, and little at 50%.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...spaces.recipe import pattern_of
from .hessian import better, damped, inverse_factor, output_error, rows
from .sparsify import mask_of

_COLUMNS = 8  # inputs whose zeros are chosen together; the paper's 128 are many for a layer of 144
_ROUNDS = 5  # of zeros that change places
_EFFORT = 2e11  # multiply-adds of conjugate gradients: 100 steps for a layer of 512 x 2048, 18 for one of 512 x 4608


@torch.no_grad()
def obs(weight: Tensor, hessian: Tensor, ratio: float, pattern: str = "") -> tuple[Tensor, Tensor]:
    """`(mask, weight)`: exactly `round(ratio * n)` zeros (or those of the pattern) and the other weights adjusted to them.

    weight: as the layer's. hessian: `[groups, inputs, inputs]`. Each row has at most the error that the mask without
    any adjustment gives it.
    """
    groups, shape = len(hessian), weight.shape
    target, curvature = rows(weight, groups), damped(hessian)
    mask = rows(_first(weight, hessian, ratio, pattern), groups)
    found = refit(target, mask, hessian)
    least = output_error(found - target, curvature).sum()
    for _ in range(_ROUNDS):
        downhill = torch.bmm((target - found).double(), curvature) / curvature.diagonal(dim1=-2, dim2=-1)[:, None]
        step = (found + 0.5 * downhill).square() * curvature.diagonal(dim1=-2, dim2=-1)[:, None]
        other = rows(mask_of(step.float().reshape(shape), ratio, pattern), groups).to(mask)
        if torch.equal(other, mask):
            break
        solved = refit(target, other, hessian)
        left = output_error(solved - target, curvature).sum()
        if left > 0.999 * least:
            break
        mask, found, least = other, solved, left
    found = better(target * mask, found, target, hessian)
    return mask.reshape(shape).clone(), found.reshape(shape)


def _first(weight: Tensor, hessian: Tensor, ratio: float, pattern: str) -> Tensor:
    """SparseGPT's mask."""
    # Input channels side by side, so that a pattern's neighbours are neighbours here.
    order = torch.arange(weight[0].numel()).view(weight.shape[1:]).movedim(0, -1).flatten()
    target, permuted = rows(weight, len(hessian))[..., order], hessian[:, order][:, :, order]
    mask = _mask(target, inverse_factor(permuted), ratio, pattern, weight.shape[1])
    return mask[..., torch.argsort(order)].reshape(weight.shape)


def _mask(target: Tensor, factor: Tensor, ratio: float, pattern: str, channels: int) -> Tensor:
    """Block by block, the zeros that cost least, `w^2 / U_jj^2` each, and what they cost is passed on."""
    left, inputs = target.double(), target.shape[-1]
    mask = torch.ones_like(target)
    keep, of = pattern_of(pattern) if pattern else (0, _COLUMNS)
    done = gone = 0
    # A pattern's groups begin anew at each position of the kernel; without one, blocks are as they come.
    run = channels if pattern else inputs
    blocks = [(i, min(i + of, first + run)) for first in range(0, inputs, run) for i in range(first, first + run, of)]
    for start, end in blocks:
        scores = (left[..., start:end] / factor.diagonal(dim1=-2, dim2=-1)[:, None, start:end]).square()
        size = end - start
        if pattern:
            count = size - -(-size * keep // of)
            least = torch.argsort(scores, dim=-1, stable=True)[..., :count]
            mask[..., start:end] = torch.ones_like(scores).scatter(-1, least, 0.0).to(mask)
        else:
            done += scores.numel()
            count = round(target.numel() * ratio * done / target.numel()) - gone
            gone += count
            flat = torch.ones(scores.numel())
            flat[torch.argsort(scores.flatten(), stable=True)[:count]] = 0
            mask[..., start:end] = flat.view_as(scores).to(mask)
        errors = torch.zeros_like(scores)
        for j in range(start, end):
            error = left[..., j] * (1 - mask[..., j]) / factor[:, None, j, j]
            errors[..., j - start] = error
            left[..., j:end] -= error[..., None] * factor[:, None, j, j:end]
        left[..., end:] -= torch.bmm(errors, factor[:, start:end, end:])
    return mask


@torch.no_grad()
def refit(target: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """Of all weights with these zeros those of least (damped) output error against `target`, all `[groups, rows, inputs]`.

    Conjugate gradients on all rows at once, preconditioned with the diagonal; every step lessens the error of every row.
    """
    curvature, keep = damped(hessian), mask.double()
    scale = curvature.diagonal(dim1=-2, dim2=-1)[:, None]
    found = target.double() * keep
    residual = torch.bmm(target.double() - found, curvature) * keep
    direction = residual / scale
    size = (residual * direction).sum(-1, keepdim=True)
    start = size.clone()
    effort = target.numel() * target.shape[-1]
    for _ in range(min(100, max(10, round(_EFFORT / effort)))):
        going = size > 1e-8 * start
        if not bool(going.any()):
            break
        along = torch.bmm(direction, curvature) * keep
        step = torch.where(going, size / (direction * along).sum(-1, keepdim=True).clamp_min(1e-300), 0.0)
        found += step * direction
        residual -= step * along
        preconditioned = residual / scale
        grown = (residual * preconditioned).sum(-1, keepdim=True)
        direction = preconditioned + torch.where(going, grown / size.clamp_min(1e-300), 0.0) * direction
        size = grown
    return found.to(target.dtype)
