"""Weights as integers: symmetric, one scale per output channel, rounded to nearest.

One bit is a sign: -1 or 1, and never 0.

Or affine: one scale and one zero point for the whole weight, and all 2^bits codes (Jacob et al., CVPR 2018, section
2.1). Codes are counted from the zero point here too, so that 0 is zero, and only their limits differ. Such a grid is
laid over the weight as it ships, BatchNorm folded into it; or else what ships would have a scale per channel again.
So the step of a channel of the unfolded weight is `scale / factor`, by whatever the BatchNorm's factor is at the
moment.

A parametrization keeps the float weights for training and shows the network the quantized ones. Its scale is a
parameter, and since rounding passes gradients straight through, its gradient is the one of LSQ (Esser et al., ICLR
2020) but for the factor in front; a zero point stays what it was. BatchNorm folded into the layer multiplies whole
output channels, so it changes scales and not integers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...spaces.steps import Step
from ...spaces.techniques.quantize import Quantize
from .fold import channel_factors
from .frozen import FrozenWeight
from .layers import INPUT, per_output, rows

# Where a range may end, as shares of the peak. Down to a fifth: at 2 bits the optimum for a bell-shaped channel lies
# near a half.
_CLIPPED = tuple(1 - 0.8 * step / 60 for step in range(60))
_BINS = 1024  # of the histogram of a channel's magnitudes


def largest(bits: int) -> int:
    """The largest code, `2^(bits-1) - 1` (1 for a sign); its negative is the smallest."""
    return max(1, (1 << (bits - 1)) - 1)


def limits(bits: int, zero: int | None = None) -> tuple[int, int]:
    """The smallest and the largest code; with a zero point 0 and `2^bits - 1`, counted from the zero point.

    >>> limits(4), limits(4, 5)
    ((-7, 7), (-5, 10))
    """
    return (-largest(bits), largest(bits)) if zero is None else (-zero, (1 << bits) - 1 - zero)


@torch.no_grad()
def weight_scales(weight: Tensor, bits: int, ranges: str = "mse", group_size: int = 0) -> Tensor:
    """The scale of each output channel, by one of `RANGES`.

    mse minimizes the squared error of the weights; for signs that is their mean magnitude (Rastegari et al. 2016,
    XNOR-Net, equation 6). minmax makes the largest weight the largest code, percentile the 99th percentile of the
    magnitudes. entropy minimizes the KL divergence of their histogram (Migacz 2017).

    Args:
        weight: Output-first.
        bits: The width of the codes.
        ranges: One of `RANGES`.
        group_size: A scale for every so many weights of a row, the last group being what is left; 0 for one scale per
            row.

    Returns:
        `[outputs]`, or `[outputs, groups]`.
    """
    numbers = rows(weight)
    if group_size:
        groups = torch.split(numbers, group_size, 1)
        return torch.stack([weight_scales(part, bits, ranges) for part in groups], 1)
    peak = numbers.abs().amax(1).clamp_min(1e-12)
    return RANGES[ranges](numbers, peak, bits)


def spread(scale: Tensor, weight: Tensor, group_size: int = 0) -> Tensor:
    """Scales as `weight_scales` returns them, in a shape that broadcasts over the weight.

    >>> spread(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 3), 2)
    tensor([[1., 1., 2.]])
    """
    if group_size:
        return scale.repeat_interleave(group_size, 1)[:, : weight.shape[INPUT]]
    return per_output(scale, weight)


def _minmax(numbers: Tensor, peak: Tensor, bits: int) -> Tensor:
    return peak / largest(bits)


def _percentile(numbers: Tensor, peak: Tensor, bits: int) -> Tensor:
    high = torch.quantile(numbers.abs(), 0.99, dim=1)
    return torch.where(high > 0, high, peak) / largest(bits)  # a channel of few weights that are not zero


def _mse(numbers: Tensor, peak: Tensor, bits: int) -> Tensor:
    if bits == 1:
        return numbers.abs().mean(1).clamp_min(1e-12)
    best_error = torch.full_like(peak, torch.inf)
    best = peak / largest(bits)
    for share in _CLIPPED:
        scale = peak * share / largest(bits)
        error = (codes(numbers, scale, bits) * scale[:, None] - numbers).square().sum(1)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def _entropy(numbers: Tensor, peak: Tensor, bits: int) -> Tensor:
    """P: the histogram of the magnitudes, what is clipped in its last bin. Q: the same without it, a mean per code."""
    levels = largest(bits) + 1
    bins = (numbers.abs() / peak[:, None] * _BINS).long().clamp_max(_BINS - 1)
    counts = torch.zeros(len(numbers), _BINS, dtype=torch.float64)
    counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.float64))
    counts[:, 0] = 0  # zeros are exact at every scale, and of a sparse weight they would be all there is to see
    best_divergence = torch.full_like(peak, torch.inf, dtype=torch.float64)
    best = peak / largest(bits)
    for share in _CLIPPED:
        width = max(levels, round(_BINS * share))
        p, q = counts[:, :width].clone(), counts[:, :width]
        p[:, -1] += counts[:, width:].sum(1)
        # Code k stands for what is rounded to it: its neighbourhood of one step, and half a step at either end.
        code = ((torch.arange(width) + 0.5) / width * (levels - 1)).round().long().expand(len(numbers), -1)
        there = (q > 0).double()
        total = torch.zeros(len(numbers), levels, dtype=torch.float64).scatter_add_(1, code, q)
        number = torch.zeros_like(total).scatter_add_(1, code, there)
        q = (total / number.clamp_min(1)).gather(1, code) * there
        p = p / p.sum(1, keepdim=True).clamp_min(1e-12)
        q = (q + 1e-6) / (q + 1e-6).sum(1, keepdim=True)
        divergence = torch.where(p > 0, p * (p.clamp_min(1e-300).log() - q.log()), 0.0).sum(1)
        better = divergence < best_divergence
        best = torch.where(better, peak * (width / _BINS) / largest(bits), best)
        best_divergence = torch.where(better, divergence, best_divergence)
    return best


RANGES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "mse": _mse,
    "minmax": _minmax,
    "percentile": _percentile,
    "entropy": _entropy,
}


@torch.no_grad()
def affine_grid(weight: Tensor, bits: int, ranges: str = "mse") -> tuple[Tensor, int]:
    """The scale and the zero point of a whole weight, by one of `RANGES` but entropy.

    minmax covers the smallest to the largest weight and zero, as torch's `MinMaxObserver` does. percentile leaves out
    half a per cent at either end. mse minimizes the squared error, over ranges that are shortened at both ends, then
    at each end.

    Args:
        weight: Output-first.
        bits: The width of the codes.
        ranges: `mse`, `minmax` or `percentile`.

    Returns:
        `(scale, zero point)`: `[1]`, and a number of 0..`2^bits - 1`.

    Example:
        >>> scale, zero = affine_grid(torch.tensor([[-1.0, 0.0, 0.5, 2.0]]), 2, "minmax")
        >>> scale.tolist(), zero, codes(torch.tensor([[-1.0, 0.4, 2.0]]), scale, 2, zero).tolist()
        ([1.0], 1, [[-1.0, 0.0, 2.0]])
    """
    flat = weight.detach().flatten()
    low, high = flat.min().clamp_max(0), flat.max().clamp_min(0)
    if ranges == "percentile":
        rank = max(1, round(0.005 * len(flat)))
        ends = flat.kthvalue(rank).values.clamp_max(0), flat.kthvalue(len(flat) + 1 - rank).values.clamp_min(0)
        low, high = ends if bool(ends[0] < ends[1]) else (low, high)  # a weight of few numbers that are not zero
    if ranges != "mse":
        return _grid(low, high, bits)

    def error(begin: float, end: float) -> float:
        scale, zero = _grid(low * begin, high * end, bits)
        return float((codes(flat, scale, bits, zero) * scale - flat).square().sum())

    begin = end = min(_CLIPPED, key=lambda share: error(share, share))
    begin = min((begin, *_CLIPPED[::2]), key=lambda share: error(share, end))
    end = min((end, *_CLIPPED[::2]), key=lambda share: error(begin, share))
    return _grid(low * begin, high * end, bits)


def _grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, int]:
    scale = ((high - low) / ((1 << bits) - 1)).clamp_min(1e-12)
    return scale.view(1), int((-low / scale).round().clamp(0, (1 << bits) - 1))


def codes(weight: Tensor, scale: Tensor, bits: int, zero: int | None = None) -> Tensor:
    """The integers of a weight, as floats: rounded half to even, saturated at `limits(bits, zero)`; the sign of 0 is 1.

    Args:
        weight: Output-first.
        scale: `[outputs]`, or in a shape that broadcasts over the weight.
        bits: The width of the codes.
        zero: The zero point, from which codes are counted, or None.
    """
    return _nearest(weight / (per_output(scale, weight) if scale.ndim == 1 else scale), bits, zero)


def rounded(weight: Tensor, scale: Tensor, bits: int, zero: int | None = None) -> Tensor:
    """The nearest `scale * code` to each number, for a scale that broadcasts."""
    return _nearest(weight / scale, bits, zero) * scale


def _nearest(quotient: Tensor, bits: int, zero: int | None) -> Tensor:
    if bits == 1:
        return torch.where(quotient < 0, -1.0, 1.0).to(quotient.dtype)
    return torch.round(quotient).clamp(*limits(bits, zero))


class FakeQuantize(nn.Module):
    """A parametrization of a weight: zeros first, then quantization (none from 16 bits up).

    Args:
        weight: Output-first.
        bits: The width of the codes.
        mask: 1 and 0, as the weight, or None.
        scale: Of each output channel, of each group of one, or with a zero point of the whole weight; None for the
            `weight_scales` of the masked weight.
        pattern: The pattern of the mask, see `Sparsify`.
        group_size: As for `weight_scales`.
        zero: The zero point of an affine grid, or None.
        norm: The BatchNorm that the weight will be folded with, where there is a zero point.
    """

    mask: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        mask: Tensor | None,
        scale: Tensor | None = None,
        pattern: str = "",
        group_size: int = 0,
        zero: int | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.pattern, self.group_size, self.zero = bits, pattern, group_size, zero
        self._norm = (norm,)  # the network's own, no part of this
        self.register_buffer("mask", mask)
        self.scale: nn.Parameter | None = None
        if bits <= 8:
            if scale is None:
                scale = weight_scales(weight if mask is None else weight * mask, bits, group_size=group_size)
            self.scale = nn.Parameter(scale)

    @property
    def factor(self) -> Tensor | None:
        """What folding would multiply each output channel by at present, where that changes the grid."""
        return None if self._norm[0] is None else channel_factors(self._norm[0])

    def step(self, scale: Tensor, weight: Tensor) -> Tensor:
        """The step from code to code, in a shape that broadcasts over the (unfolded) weight."""
        factor = self.factor
        return spread(scale if factor is None else scale / factor, weight, self.group_size)

    def forward(self, weight: Tensor) -> Tensor:
        if self.mask is not None:
            weight = weight * self.mask
        if self.scale is None:
            return weight.half().float() if self.bits == 16 and not self.training else weight
        fixed = self.scale.detach()
        # The step of a scale is the step that the weights themselves would take in its direction. LSQ's own factor, 1 /
        # sqrt(n * top), fits its own initial scale; on the least-squares scale of 8 bits it is hundreds of times too
        # large and destroys a trained network within 30 steps (depthwise layers of mobilenet_v2: 84% to 25%).
        squares = rows(weight).square()
        if self.group_size:
            missing = -squares.shape[1] % self.group_size
            squares = F.pad(squares, (0, missing)).view(len(squares), -1, self.group_size)
        total = squares.sum(-1) if self.zero is None else squares.sum().view(1)
        balance = fixed.square() / total.clamp_min(1e-12)
        scale = (fixed + (self.scale - fixed) * balance).clamp_min(1e-12)  # exactly the scale that ships
        scale = self.step(scale, weight)
        if self.bits == 1:
            # Straight through without a clip: beyond a scale that is the mean magnitude lie two of five weights, which
            # a clip would hold for good.
            return codes(weight.detach(), scale, 1) * scale + (weight - weight.detach())
        level = (weight / scale).clamp(*limits(self.bits, self.zero))
        shown: Tensor = (level + (level.round() - level).detach()) * scale
        return shown

    def frozen(self, weight: Tensor, step: Step | None) -> tuple[Tensor, FrozenWeight | None]:
        """See `frozen.Freezable`."""
        if self.mask is not None:
            weight = weight * self.mask
        if self.bits == 16:
            return weight.half().float(), FrozenWeight(16)
        if self.scale is None:
            return weight, None
        assert isinstance(step, Quantize)
        scale = self.scale.detach().clamp_min(1e-12)
        wide = self.step(scale, weight)
        whole = codes(weight, wide, self.bits, self.zero)
        made = FrozenWeight(
            self.bits,
            step.activation_bits,
            whole,
            scale.clone(),
            dynamic=step.activations == "dynamic",
            group_size=self.group_size,
            zero=self.zero,
            factor=self.factor,
        )
        return whole * wide, made
