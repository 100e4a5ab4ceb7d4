"""BatchNorm folded into the layer in front of it, and its statistics estimated anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def fold_factors(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """`(factor, shift)` with `norm(x) = factor * x + shift` per channel, in evaluation mode."""
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(variance, Tensor)
    factor = torch.rsqrt(variance + norm.eps)  # type: ignore[operator]
    if isinstance(norm.weight, Tensor):
        factor = factor * norm.weight.detach()
    shift = -mean * factor
    if isinstance(norm.bias, Tensor):
        shift = shift + norm.bias.detach()
    return factor, shift


@torch.no_grad()
def fold_batchnorms(model: nn.Module, folds: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Fold each `(layer, batchnorm)` pair in place; returns by layer the factor its output channels were scaled by."""
    factors = {}
    modules = dict(model.named_modules())
    for layer_name, norm_name in folds:
        layer, norm = modules.get(layer_name), modules.get(norm_name)
        if layer is None or norm is None:  # in a block that was left out
            continue
        factor, shift = fold_factors(norm)
        assert isinstance(layer.weight, Tensor)
        layer.weight.copy_(layer.weight * factor.view(-1, *[1] * (layer.weight.ndim - 1)))
        bias = shift if layer.bias is None else layer.bias * factor + shift  # type: ignore[operator]
        layer.bias = nn.Parameter(bias.clone())
        model.set_submodule(norm_name, nn.Identity())
        factors[layer_name] = factor
    return factors


@torch.no_grad()
def reestimate_batchnorms(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Replace the running statistics by the averages over the batches; all else stays in evaluation mode.

    It repairs most of what quantization and pruning shift (Li et al. 2018, AdaBN; used by OBC, Frantar & Alistarh 2022).
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    model.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the cumulative average
        norm.train()
    for batch in batches:
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
