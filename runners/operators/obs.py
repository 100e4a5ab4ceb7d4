"""Optimal brain surgeon: zeros are chosen by their cost after the other weights have been adjusted to them.

Exact OBS (Hassibi & Stork 1992, as Frantar & Alistarh, NeurIPS 2022, do it row by row): the weight that costs least
becomes zero, the others of its row are adjusted, and so on until none is left. Rows do not touch each other's
outputs, so their sequences merge into one order of all weights, of which every level of sparsity is the beginning:
one sweep serves them all. The weights that stay are then solved for at each level. On layers of ResNet-20, at 30 to
90% zeros, that leaves 1% to 23% of the output error of zeros by magnitude.

A sweep takes `rows * inputs^3 / 3` multiply-adds. A layer too large for that gets SparseGPT's mask (Frantar &
Alistarh, ICML 2023), level by level: one pass over the inputs with one Cholesky factor for all rows, in which only
the inputs that follow are adjusted to a zero. Then some zeros change places with others that now cost less (iterative
hard thresholding, Blumensath & Davies 2009). That leaves 1.1 to 3 times the error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...spaces.techniques.sparsify import pattern_of
from .hessian import better, damped, inverse_factor, output_error
from .layers import as_matrix, from_matrix, row_shape, rows
from .sparsify import mask_of

_SWEEP = 1e11  # multiply-adds of a sweep: seconds
_STEPS = 32  # zeros of a row before its inverse Hessian is brought up to date, for fewer passes over memory
_INVERSES = 1 << 23  # numbers of inverse Hessians at a time, one for each row: 64 MiB
_COLUMNS = 8  # inputs whose zeros are chosen together; the paper's 128 are many for a layer of 144
_ROUNDS = 5  # of zeros that change places
_EFFORT = 2e11  # multiply-adds of conjugate gradients: 100 steps for a layer of 512 x 2048, 18 for one of 512 x 4608


def sweepable(weight: Tensor) -> bool:
    """Whether `order` takes only seconds for such a weight."""
    outputs, inputs = rows(weight).shape
    return outputs * inputs**3 / 3 <= _SWEEP


@torch.no_grad()
def order(weight: Tensor, hessian: Tensor, pattern: str = "") -> Tensor:
    """The position of each weight in the order in which exact OBS sets them to zero; the first is 0.

    Args:
        weight: Output-first.
        hessian: `[groups, inputs, inputs]`.
        pattern: `N:M`, or "". Weights that must stay because their neighbours are removed before them come last.

    Returns:
        Positions as floats, as the weight.

    Example:
        >>> weight, hessian = torch.tensor([[3.0, 1.0, 2.0], [0.5, 4.0, 5.0]]), torch.eye(3)[None]
        >>> order(weight, hessian)
        tensor([[3., 1., 2.],
                [0., 4., 5.]])
    """
    groups, inputs = hessian.shape[:2]
    target = rows(weight).double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian)))
    blocks, room = _blocks(weight, pattern)
    each = len(target) // groups
    cost = torch.full_like(target, torch.inf)
    for part in torch.split(torch.arange(len(target)), max(1, _INVERSES // inputs**2)):
        _sweep(target[part].clone(), inverse[part // each], blocks, room, cost, part)
    place = torch.empty(cost.numel())
    place[torch.argsort(cost.flatten(), stable=True)] = torch.arange(len(place), dtype=place.dtype)
    return place.view(weight.shape)


def _blocks(weight: Tensor, pattern: str) -> tuple[Tensor, Tensor]:
    """By input the number of its block, and how many zeros each block may have; one block without a pattern."""
    channels, positions = row_shape(weight)
    if not pattern:
        return torch.zeros(channels * positions, dtype=torch.long), torch.tensor([channels * positions])
    keep, of = pattern_of(pattern)
    block = torch.arange(channels)[:, None] // of * positions + torch.arange(positions)
    blocks = block.flatten()
    sizes = torch.bincount(blocks)
    return blocks, sizes - (sizes * keep + of - 1) // of


def _sweep(weight: Tensor, inverse: Tensor, blocks: Tensor, room: Tensor, cost: Tensor, part: Tensor) -> None:
    """Exact OBS on some rows at once, `[rows, inputs]`, each with its inverse Hessian; writes what each zero costs to
    `cost[part]`.

    A zero's cost is more than all before it in its row, if by a hair, so that costs put a row's zeros in their order.
    Inputs that are zero in a row leave its inverse, which shrinks.
    """
    here = torch.arange(len(weight))
    left = torch.arange(weight.shape[1]).expand_as(weight)  # the inputs that are not zero yet, of each row
    room = room.expand(len(weight), -1).clone()
    highest, never = weight.new_zeros(len(weight)), weight.new_tensor(torch.inf)
    zeros = int(room[0].sum())
    for start in range(0, zeros, _STEPS):
        steps = min(_STEPS, zeros - start)
        there = torch.ones_like(left, dtype=torch.bool)
        diagonal = inverse.diagonal(dim1=1, dim2=2).clone()
        taken = weight.new_zeros(len(weight), steps, left.shape[1])  # inverse - taken^T taken is up to date
        for step in range(steps):
            free = there & (room.gather(1, blocks[left]) > 0)
            price, at = torch.where(free, weight.square() / diagonal, never).min(1)
            highest = torch.maximum(torch.nextafter(highest, never), price)
            cost[part, left[here, at]] = highest
            column = inverse[here, at]
            if step:
                column = column - torch.bmm(taken[here, :step, at][:, None], taken[:, :step])[:, 0]
            column = column / column[here, at].sqrt()[:, None]
            weight -= column * (weight[here, at] / column[here, at])[:, None]
            diagonal -= column.square()
            taken[:, step] = column
            there[here, at] = False
            room[here, blocks[left[here, at]]] -= 1
        inverse.baddbmm_(taken.transpose(1, 2), taken, alpha=-1)
        stay = there.nonzero()[:, 1].view(len(weight), -1)
        inverse = inverse[here[:, None, None], stay[:, :, None], stay[:, None]]
        weight, left = weight.gather(1, stay), left.gather(1, stay)


@torch.no_grad()
def obs(
    weight: Tensor, hessian: Tensor, ratio: float, pattern: str = "", order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose zeros and adjust the other weights to them.

    No row has a larger output error than the mask without any adjustment gives it.

    Args:
        weight: Output-first.
        hessian: `[groups, inputs, inputs]`.
        ratio: The share of zeros; exactly `round(ratio * n)` weights become zero.
        pattern: `N:M`, whose zeros are taken in place of the share, or "".
        order: What `order` returns; None for a layer too large for that (see `sweepable`).

    Returns:
        `(mask, weight)`, both as the weight.
    """
    target = as_matrix(weight, len(hessian))
    if order is None:
        mask, solved = _exchanged(weight, hessian, ratio, pattern)
    else:
        mask = as_matrix(mask_of(order, ratio, pattern), len(hessian)).to(weight)
        solved = refit(target, mask, hessian)
    solved = better(target * mask, solved, target, hessian)
    return from_matrix(mask, weight.shape).clone(), from_matrix(solved, weight.shape)


def _exchanged(weight: Tensor, hessian: Tensor, ratio: float, pattern: str) -> tuple[Tensor, Tensor]:
    """SparseGPT's mask with some zeros in other places, and the weights, both `[groups, rows, inputs]`."""
    groups, shape = len(hessian), weight.shape
    target, curvature = as_matrix(weight, groups), damped(hessian)
    mask = as_matrix(_first(weight, hessian, ratio, pattern), groups)
    current = refit(target, mask, hessian)
    least = output_error(current - target, curvature).sum()
    for _ in range(_ROUNDS):
        downhill = torch.bmm((target - current).double(), curvature) / curvature.diagonal(dim1=-2, dim2=-1)[:, None]
        step = (current + 0.5 * downhill).square() * curvature.diagonal(dim1=-2, dim2=-1)[:, None]
        other = as_matrix(mask_of(from_matrix(step.float(), shape), ratio, pattern), groups).to(mask)
        if torch.equal(other, mask):
            break
        solved = refit(target, other, hessian)
        left = output_error(solved - target, curvature).sum()
        if left > 0.999 * least:
            break
        mask, current, least = other, solved, left
    return mask, current


def _first(weight: Tensor, hessian: Tensor, ratio: float, pattern: str) -> Tensor:
    """SparseGPT's mask."""
    # Input channels side by side, so that a pattern's neighbours are neighbours here.
    channels, positions = row_shape(weight)
    order = torch.arange(channels * positions).view(channels, positions).T.flatten()
    target, permuted = as_matrix(weight, len(hessian))[..., order], hessian[:, order][:, :, order]
    mask = _mask(target, inverse_factor(permuted), ratio, pattern, channels)
    return from_matrix(mask[..., torch.argsort(order)], weight.shape)


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
    """The weights with the given zeros that have the smallest (damped) output error against `target`.

    Conjugate gradients on all rows at once, preconditioned with the diagonal; each step reduces the error of every row.

    Args:
        target: `[groups, rows, inputs]`.
        mask: 1 and 0, as `target`.
        hessian: `[groups, inputs, inputs]`.

    Returns:
        The weights, as `target`.
    """
    curvature, keep = damped(hessian), mask.double()
    scale = curvature.diagonal(dim1=-2, dim2=-1)[:, None]
    solution = target.double() * keep
    residual = torch.bmm(target.double() - solution, curvature) * keep
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
        solution += step * direction
        residual -= step * along
        preconditioned = residual / scale
        grown = (residual * preconditioned).sum(-1, keepdim=True)
        direction = preconditioned + torch.where(going, grown / size.clamp_min(1e-300), 0.0) * direction
        size = grown
    return solution.to(target.dtype)
