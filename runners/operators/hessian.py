"""The Hessian of a layer's own error: `H = X X^T` over the calibration inputs, one for each group of a convolution.

Changing a row of weights by `d` changes the layer's outputs by `d X`, whose squared sum is `d H d^T`. So with H alone
the error of any change of weights can be computed and made small, without the inputs. It concerns what goes into the
layer: BatchNorm behind it multiplies whole rows, and the best change of a row is the same with it and without.

Weights come as rows `[groups, output channels of a group, inputs]`, where inputs are input channels times kernel
positions; a depthwise convolution has as many groups as channels, and everything here works on all of them at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import channels_of, groups_of, patches, rows, samples, weight_of

DAMPING = 0.01  # of the mean of the diagonal (Frantar et al. 2023)
_BLOCK = 1 << 23  # unfolded inputs at a time: 32 MiB


@torch.no_grad()
def gram(layer: nn.Module, x: Tensor) -> Tensor:
    """`X X^T` of a batch of inputs, accumulated in double precision and bounded memory.

    Args:
        layer: The layer that reads the inputs.
        x: A batch of its inputs.

    Returns:
        `[groups, inputs, inputs]`, float64.
    """
    inputs, groups = rows(weight_of(layer)).shape[1], groups_of(layer)
    total = torch.zeros(groups, inputs, inputs, dtype=torch.float64)
    x = samples(layer, x)
    # About as many positions as the input has, and many fewer where the stride is large.
    each = groups * inputs * (x[0].numel() // channels_of(layer)[0])
    for part in torch.split(x, max(1, _BLOCK // max(1, each))):
        inputs_of_part = patches(layer, part.float())
        total += torch.bmm(inputs_of_part, inputs_of_part.transpose(1, 2))
    return total


def damped(hessian: Tensor) -> Tensor:
    """The Hessian in double precision with a raised diagonal, so that it can be inverted.

    An input that is always zero gets 1 on the diagonal.
    """
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal += torch.where(mean > 0, DAMPING * mean, 1.0)
    return hessian


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular factor U of the inverse of the damped Hessian, `U^T U = H^-1`.

    Row j of U, from its diagonal on, gives the best correction of the inputs after j for a change of input j, all
    inputs before it being fixed (Frantar et al. 2023, section 3.3).
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian)))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def output_error(change: Tensor, hessian: Tensor) -> Tensor:
    """The squared error of each row's outputs for a change of weights.

    Args:
        change: `[groups, rows, inputs]`.
        hessian: `[groups, inputs, inputs]`.

    Returns:
        `[groups, rows]`, float64.
    """
    change, hessian = change.double(), hessian.double()
    return (torch.bmm(change, hessian) * change).sum(-1)


def better(first: Tensor, second: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """Row by row, whichever weight has the smaller output error against `target`; `first` where they are equal."""
    errors = [output_error(choice - target, hessian) for choice in (first, second)]
    return torch.where((errors[1] < errors[0]).unsqueeze(-1), second, first)
