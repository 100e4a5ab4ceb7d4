"""Moment matching where no BatchNorm follows: every output channel gets the original's mean and variance back.

Rounded and missing weights shift what a layer gives and shrink its spread, and nothing behind it takes that out as
BatchNorm's statistics do. The shift goes into the bias (bias correction: Nagel et al. 2019, data-free quantization,
section 4.2; here from calibration images) and the spread into the scale of the output channel, which quantized layers
have anyway, so the file does not grow by a byte. Without the spread the shift alone does harm where much is taken away:
a mean below zero in front of a ReLU with less spread around it switches the channel off.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .hooks import attached
from .layers import (
    bias_of,
    channels_last,
    layers_of,
    per_channel,
    per_output,
    set_weight,
    weight_of,
)

# A channel that hardly varies any more has lost its input; blown up it would be noise.
_MOST = 2.0
DIVIDED = "divided_by"  # the buffer of a layer whose output channels were divided, by what (`equalize`)
Moments = dict[str, tuple[Tensor, Tensor]]  # by layer: mean and variance of each output channel


def _moments(layer: nn.Module, output: Tensor) -> tuple[Tensor, Tensor]:
    """`(mean, variance)` of each output channel."""
    channels = channels_last(layer, output).flatten(0, -2)
    variance, mean = torch.var_mean(channels, 0, correction=0)
    return mean, variance


@torch.no_grad()
def output_moments(model: nn.Module, batches: Sequence[Tensor], without: Collection[str] = ()) -> list[Moments]:
    """For each batch the output moments of all layers that have a bias and run once.

    Args:
        model: The network, which is put into evaluation mode.
        batches: Batches of inputs.
        without: Names of layers to leave out.

    Returns:
        For each batch, by layer the mean and variance `[channels]`.
    """
    layers = {
        name: layer for name, layer in layers_of(model).items() if bias_of(layer) is not None and name not in without
    }
    by_batch: list[Moments] = []
    again: set[str] = set()

    def keep(name: str, layer: nn.Module, arguments: object, output: Tensor) -> None:
        if name in by_batch[-1]:
            again.add(name)
        by_batch[-1][name] = _moments(layer, output)

    handles = [layer.register_forward_hook(partial(keep, name)) for name, layer in layers.items()]
    with attached(handles):
        for batch in batches:
            by_batch.append({})
            model.eval()(batch)
    return [{name: value for name, value in moments.items() if name not in again} for moments in by_batch]


@torch.no_grad()
def match_moments(
    model: nn.Module, batches: Sequence[Tensor], expected: Sequence[Moments], one_factor: Collection[str] = ()
) -> dict[str, Tensor]:
    """Give layers the moments that `output_moments` measured in the original network, in place.

    One pass over the batches, as for the re-estimation of BatchNorm: within a batch a layer is corrected before the
    next one runs; the correction that is stored is the one for all batches together. Layers that are missing or lost
    channels stay as they are.

    Args:
        model: The compressed network.
        batches: The batches of inputs that `expected` was measured on.
        expected: What `output_moments` returned for the original network.
        one_factor: Layers whose weights have one scale for all channels; all their channels are multiplied by the same
            factor (the geometric mean).

    Returns:
        By layer the factor `[channels]` that its output channels, and so its weights, were multiplied by.
    """
    there = layers_of(model)
    layers = {
        name: there[name]
        for name, (mean, _) in (expected[0] if expected else {}).items()
        if name in there and (bias := bias_of(there[name])) is not None and bias.shape == mean.shape
    }
    own_moments: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    wanted: Moments = {}

    def correct(name: str, layer: nn.Module, arguments: object, output: Tensor) -> Tensor:
        own_moments[name].append(_moments(layer, output))
        factor, shift = _affine([own_moments[name][-1]], [_divided(layer, wanted[name])], name in one_factor)
        return output * per_channel(layer, factor, output) + per_channel(layer, shift, output)

    handles = [layer.register_forward_hook(partial(correct, name)) for name, layer in layers.items()]
    with attached(handles):
        for batch, moments in zip(batches, expected, strict=True):
            wanted = moments
            model.eval()(batch)
    factors = {}
    for name, layer in layers.items():
        own = [_divided(layer, moments[name]) for moments in expected]
        factor, shift = _affine(own_moments[name], own, name in one_factor)
        weight, bias = weight_of(layer), bias_of(layer)
        assert bias is not None
        set_weight(layer, weight * per_output(factor, weight))
        bias.copy_(bias * factor + shift)
        factors[name] = factor
    return factors


def _divided(layer: nn.Module, moments: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The moments that the original's channels have in a layer whose channels were divided."""
    mean, variance = moments
    by = getattr(layer, DIVIDED, torch.ones(()))
    return mean / by, variance / by.square()


def _affine(
    given: Sequence[tuple[Tensor, Tensor]], wanted: Sequence[tuple[Tensor, Tensor]], together: bool
) -> tuple[Tensor, Tensor]:
    """`(factor, shift)` per channel that turn the found moments into the wanted ones, on average over batches."""
    mean, variance = (torch.stack(values).mean(0) for values in zip(*given, strict=True))
    target, spread = (torch.stack(values).mean(0) for values in zip(*wanted, strict=True))
    factor = (spread / variance.clamp_min(1e-12)).sqrt().clamp(1 / _MOST, _MOST)
    if together:
        factor = factor.log().mean().exp().expand_as(factor)
    return factor, target - factor * mean
