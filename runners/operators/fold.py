"""BatchNorm folded into the layer in front of it, and its statistics estimated anew."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .layers import bias_of, per_output, replace_bias, set_weight, weight_of
from .lowrank import parts


def fold_factors(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """`(factor, shift)` with `norm(x) = factor * x + shift` per channel, in evaluation mode."""
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(variance, Tensor)
    eps = norm.eps
    assert isinstance(eps, int | float)
    factor = torch.rsqrt(variance + eps)
    if isinstance(norm.weight, Tensor):
        factor = factor * norm.weight.detach()
    shift = -mean * factor
    if isinstance(norm.bias, Tensor):
        shift = shift + norm.bias.detach()
    return factor, shift


def channel_factors(norm: nn.Module) -> Tensor:
    """The factors of `fold_factors`, to divide by: those of channels that are switched off are not quite zero."""
    factor = fold_factors(norm)[0].detach()
    return torch.where(factor.abs() < 1e-12, 1e-12, factor)


@torch.no_grad()
def fold_batchnorms(model: nn.Module, folds: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Fold each `(layer, batchnorm)` pair, in place.

    In a layer of low rank the second factor has the output channels, and its name is the one that is returned.

    Args:
        model: The network, in evaluation mode.
        folds: Pairs of names; pairs in a block that was left out are ignored.

    Returns:
        By layer the factor `[channels]` that its output channels were multiplied by.
    """
    factors = {}
    modules = dict(model.named_modules())
    for layer_name, norm_name in folds:
        layer, norm = modules.get(layer_name), modules.get(norm_name)
        if layer is None or norm is None:  # in a block that was left out
            continue
        layer_name = parts(model, layer_name)[-1]
        layer = model.get_submodule(layer_name)
        factor, shift = fold_factors(norm)
        weight, bias = weight_of(layer), bias_of(layer)
        set_weight(layer, weight * per_output(factor, weight))
        replace_bias(layer, shift if bias is None else bias * factor + shift)
        model.set_submodule(norm_name, nn.Identity())
        factors[layer_name] = factor
    return factors


def batchnorms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """By name, the BatchNorms that track statistics."""
    modules = model.named_modules()
    return {n: m for n, m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats}


@torch.no_grad()
def reestimate_batchnorms(
    model: nn.Module,
    batches: Iterable[Tensor],
    bias: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    only: Collection[str] | None = None,
    one_factor: Collection[str] = (),
) -> None:
    """Replace the running statistics by their averages over the batches; all else stays in evaluation mode.

    This repairs most of what quantization and pruning shift (Li et al. 2018, AdaBN; used by OBC, Frantar & Alistarh
    2022).

    Args:
        model: The network, changed in place.
        batches: Batches of inputs.
        bias: From `calibration_bias`; with it the statistics change only by what compression changed.
        only: The names of the BatchNorms to estimate; all when None.
        one_factor: The names of those behind weights that have one scale for all channels. Their variances change by
            a common factor (the geometric mean), and so does what folding multiplies the weight by.
    """
    norms = {name: norm for name, norm in batchnorms(model).items() if only is None or name in only}
    if not norms:
        return
    model.eval()
    before = {name: norm.running_var + norm.eps for name, norm in norms.items() if norm.running_var is not None}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # the cumulative average
        norm.train()
    for batch in batches:
        model(batch)
    for name, norm in norms.items():
        norm.momentum = momenta[name]
        if bias is not None:
            offset, factor = bias[name]
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean += offset
            norm.running_var *= factor
        if name in one_factor:
            assert norm.running_var is not None
            # A channel that hardly varies any more, or never did, must not move the others.
            change = ((norm.running_var + norm.eps) / before[name]).clamp(0.25, 4).log().mean().exp()
            norm.running_var = before[name] * change - norm.eps
    model.eval()


def calibration_bias(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The difference between a network's own statistics and those of its calibration images, by BatchNorm.

    A few hundred calibration images never have quite the statistics of the training that the network comes from: they
    are few, and may be cropped otherwise. Re-estimation would take that for an effect of compression and cost the
    original network 0.3 points (ResNet-20 on CIFAR-10, 512 training crops), 2.2 points (mobilenet_v2, random resized
    crops that it was not trained with) or 4 points (ResNet-20, images without the crops it was trained with). With
    the bias taken out it costs nothing, by construction.

    Returns:
        By BatchNorm what to add to a mean over the batches, and what to multiply a variance by, to get the network's
        own.
    """
    probe = copy.deepcopy(model)
    reestimate_batchnorms(probe, batches)
    bias = {}
    for (name, own), estimated in zip(batchnorms(model).items(), batchnorms(probe).values(), strict=True):
        assert own.running_mean is not None
        assert own.running_var is not None
        assert estimated.running_mean is not None
        assert estimated.running_var is not None
        factor = own.running_var / estimated.running_var.clamp_min(1e-12)
        bias[name] = (own.running_mean - estimated.running_mean, factor)
    return bias
