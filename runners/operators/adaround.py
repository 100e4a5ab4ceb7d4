"""AdaRound: whether each weight is rounded up or down is learned.

Nagel, Amjad, van Baalen, Louizos, Blankevoort: Up or Down? Adaptive Rounding, ICML 2020.

The rectified sigmoid of a variable per weight says how far up it is rounded; a regularizer, harder from step to step,
drives it to 0 or 1. The paper minimises the error of the layer's outputs on batches of inputs. Without an activation
behind the layer that error is quadratic in the weights, so here the Hessian gives it for all inputs at once: no
noise, no inputs in memory, and some hundred steps in place of ten thousand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .hessian import better, damped, output_error
from .layers import as_matrix, from_matrix, per_output
from .quantize import codes, limits

# Found on the layers of ResNet-20 at 2 and 3 bits; twice the steps give a twentieth less error.
STEPS, RATE, REGULARIZER = 500, 0.1, 10.0
_LOW, _HIGH = -0.1, 1.1  # the sigmoid is stretched to these and cut off at 0 and 1


@torch.no_grad()
def adaround(
    weight: Tensor, scale: Tensor, bits: int, hessian: Tensor, mask: Tensor | None = None, zero: int | None = None
) -> Tensor:
    """Round a weight to the grid `scale * codes`, each code up or down, with a small error of the layer's outputs.

    Deterministic. No row has a larger error than nearest rounding gives it.

    Args:
        weight: Output-first.
        scale: `[outputs]`, or in a shape that broadcasts over the weight.
        bits: The width of the codes.
        hessian: `[groups, inputs, inputs]`.
        mask: 1 and 0, as the weight; weights with 0 stay zero.
        zero: The zero point, as for `codes`.

    Returns:
        The rounded weight, as the weight.
    """
    groups, gap = len(hessian), 2 if bits == 1 else 1  # from -1 the next sign is 1
    low, high = limits(bits, zero)
    target = as_matrix(weight, groups).float()
    wide = (per_output(scale, weight) if scale.ndim == 1 else scale).expand_as(weight)
    steps = as_matrix(wide, groups).float()
    keep = torch.ones_like(target) if mask is None else as_matrix(mask, groups).float()
    near = as_matrix(codes(weight, scale, bits, zero) * wide, groups).float() * keep
    curvature = damped(hessian).float()
    quotient = (target / steps).clamp(low, high)
    floor = quotient.floor().clamp(low, high - gap)
    # The error of each row in units of what nearest rounding does to it, so that all rows weigh the same.
    unit = output_error(near - target, curvature).float().clamp_min(1e-20).unsqueeze(-1)
    share = ((quotient - floor) / gap).clamp(0.01, 0.99)
    variable = -torch.log((_HIGH - _LOW) / (share - _LOW) - 1)
    first, second = torch.zeros_like(variable), torch.zeros_like(variable)
    inputs = target.shape[-1]
    for step in range(STEPS):
        sigmoid = torch.sigmoid(variable)
        up = (sigmoid * (_HIGH - _LOW) + _LOW).clamp(0, 1)
        change = (floor + gap * up) * steps * keep - target
        gradient = 2 * gap * torch.bmm(change, curvature) * steps * keep / unit * inputs
        progress = step / STEPS
        if progress >= 0.2:  # the paper's warm start: rounding is free at first
            beta = 2 + 18 * (1 - (progress - 0.2) / 0.8)
            distance = 2 * up - 1
            gradient -= REGULARIZER * beta * 2 * distance.sign() * distance.abs().pow(beta - 1)
        gradient *= torch.where((up > 0) & (up < 1), sigmoid * (1 - sigmoid) * (_HIGH - _LOW), 0.0)
        # Adam (Kingma & Ba 2015)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        direction = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        variable -= RATE * direction
    up = (torch.sigmoid(variable) * (_HIGH - _LOW) + _LOW).clamp(0, 1)
    solved = (floor + gap * (up >= 0.5)) * steps * keep
    return from_matrix(better(near, solved, target, hessian), weight.shape).to(weight.dtype)
