"""Weights as integers: symmetric, one scale per output channel, chosen by least squared error.

A parametrization keeps the float weights for training and shows the network the quantized ones. Its scale is a
parameter, and since rounding passes gradients straight through, its gradient is the one of LSQ (Esser et al., ICLR
2020) but for the factor in front. BatchNorm folded into the layer multiplies whole output channels, so it changes scales and not integers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def largest(bits: int) -> int:
    """The largest code: `2^(bits-1) - 1`, and its negative is the smallest."""
    return (1 << (bits - 1)) - 1


@torch.no_grad()
def weight_scales(weight: Tensor, bits: int, steps: int = 60) -> Tensor:
    """The scale of each output channel (first axis) with the least squared error, of `steps` clipping points."""
    rows = weight.detach().flatten(1)
    peak = rows.abs().amax(1).clamp_min(1e-12)
    best_error = torch.full_like(peak, torch.inf)
    best = peak / largest(bits)
    # Down to a fifth of the peak: at 2 bits the optimum for a bell-shaped channel lies near a half of it.
    for step in range(steps):
        scale = peak * (1 - 0.8 * step / steps) / largest(bits)
        error = (codes(rows, scale, bits) * scale[:, None] - rows).square().sum(1)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The integers (as floats) of a weight: rounded half to even, saturated at `largest(bits)`."""
    top = largest(bits)
    return torch.round(weight / scale.view(-1, *[1] * (weight.ndim - 1))).clamp(-top, top)


class FakeQuantize(nn.Module):
    """A parametrization of a weight: `mask` (1 and 0) first, then quantization to `bits` (no quantization from 16 up).

    scale: of each output channel; `weight_scales` of the masked weight when None.
    """

    mask: Tensor | None

    def __init__(self, weight: Tensor, bits: int, mask: Tensor | None, scale: Tensor | None = None) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("mask", mask)
        self.scale: nn.Parameter | None = None
        if bits <= 8:
            if scale is None:
                scale = weight_scales(weight if mask is None else weight * mask, bits)
            self.scale = nn.Parameter(scale)

    def forward(self, weight: Tensor) -> Tensor:
        if self.mask is not None:
            weight = weight * self.mask
        if self.scale is None:
            return weight.half().float() if self.bits == 16 and not self.training else weight
        top = largest(self.bits)
        shape = (-1, *[1] * (weight.ndim - 1))
        fixed = self.scale.detach()
        # The step of a scale is the step that the weights themselves would take in its direction. LSQ's own factor,
        # 1 / sqrt(n * top), fits its own initial scale; on the least-squares scale of 8 bits it is hundreds of times too
        # large and destroys a trained network within 30 steps (depthwise layers of mobilenet_v2: 84% to 25%).
        balance = fixed.square() / weight.detach().flatten(1).square().sum(1).clamp_min(1e-12)
        scale = (fixed + (self.scale - fixed) * balance).clamp_min(1e-12).view(shape)  # exactly the scale that ships
        level = (weight / scale).clamp(-top, top)
        shown: Tensor = (level + (level.round() - level).detach()) * scale
        return shown
