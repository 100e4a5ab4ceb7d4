"""A layer as two thinner ones: the best approximation of its weight by a matrix of low rank.

The weight is read as the matrix `[outputs, inputs * kernel]`. A linear layer becomes two linear layers, a convolution
its own kernel from the inputs to `rank` channels and then a 1 x 1 convolution to the outputs (Zhang et al., TPAMI
2016). The other usual cut, k x 1 and then 1 x k (Jaderberg et al., 2014), is not made: it needs more per rank where
there are many channels, does nothing for 1 x 1 convolutions, and runs as kernels that runtimes are not written for.
This one is exact at full rank for every stride, padding and dilation, and the second layer has the outputs, the bias
and the BatchNorm of the old one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...errors import RecipeError
from ...spaces.techniques.lowrank import LowRank
from .layers import bias_of, kind_of, replace_bias, replace_weight, rows, weight_of


class Factored(nn.Sequential):
    """The two layers in the place of one; steps of a recipe that name the one mean both."""


@torch.no_grad()
def basis(weight: Tensor) -> Tensor:
    """The singular vectors of a weight on its shorter side, those of the largest singular values first.

    They are the eigenvectors of the smaller Gram matrix, which takes a fifth of the time of a decomposition in
    float32 for 512 x 4608. One basis serves all ranks.

    Args:
        weight: Output-first.

    Returns:
        `[side, side]`, float64.
    """
    matrix = rows(weight).double()
    matrix = matrix if _wide(matrix) else matrix.T
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)
    # A vector may come with either sign; the sign of its largest component makes it one of the two.
    signed: Tensor = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return signed


@torch.no_grad()
def factors(weight: Tensor, rank: int, vectors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Two matrices of a rank whose product is nearest to a weight.

    `second @ first` is the weight's projection on the first `rank` vectors of its basis: the truncated singular value
    decomposition, the nearest matrix of this rank in the Frobenius norm (Eckart & Young 1936). Each factor has the
    square root of the singular values.

    Args:
        weight: Output-first; all axes but the first are taken together.
        rank: The inner dimension.
        vectors: The weight's `basis`, where it is known.

    Returns:
        `(first, second)`, `[rank, columns]` and `[rows, rank]`.

    Example:
        >>> first, second = factors(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1)
        >>> (second @ first).round(decimals=5).abs().tolist()
        [[3.0, 0.0], [0.0, 0.0]]
    """
    matrix = rows(weight).double()
    wide = _wide(matrix)
    kept = (basis(weight) if vectors is None else vectors)[:, :rank]
    rest = kept.T @ (matrix if wide else matrix.T)
    roots = rest.norm(dim=1).sqrt()
    one, other = (rest / torch.where(roots > 0, roots, 1.0)[:, None]).to(weight), (kept * roots).to(weight)
    return (one, other) if wide else (other.T.contiguous(), one.T.contiguous())


def _wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def factored(layer: nn.Module, rank: int, vectors: Tensor | None = None) -> Factored:
    """Two layers that compute what a layer of one group does with its weight at `rank`.

    Args:
        layer: The layer; it stays as it is.
        rank: The channels between the two.
        vectors: The weight's `basis`, where it is known.
    """
    new = kind_of(layer).factors
    assert new is not None, f"a {type(layer).__name__} has no factors"
    first, second = factors(weight_of(layer), rank, vectors)
    pair = new(layer, rank)
    for part, factor in zip(pair, (first, second), strict=True):
        replace_weight(part, factor.view(weight_of(part).shape))
    bias = bias_of(layer)
    replace_bias(pair[1], None if bias is None else bias.detach())
    return Factored(*pair).train(layer.training)


def parts(model: nn.Module, layer: str) -> tuple[str, ...]:
    """The names of the modules that a layer of a recipe is made of: its own, or those of its two factors."""
    return (f"{layer}.0", f"{layer}.1") if isinstance(model.get_submodule(layer), Factored) else (layer,)


def factor_layers(
    model: nn.Module, steps: Sequence[LowRank], example: Tensor, basis_of: Callable[[Tensor], Tensor] = basis
) -> None:
    """Put two layers in the place of each that a step names, in place; `basis_of` gives what `basis` does.

    Raises `RecipeError` when the network does not run with them, on the `example` input.
    """
    for step in steps:
        layer = model.get_submodule(step.layer)
        model.set_submodule(step.layer, factored(layer, step.rank, basis_of(weight_of(layer))))
    try:
        with torch.no_grad():
            model(example)
    except Exception as error:  # whatever a network raises that reads its layers' attributes itself
        names = ", ".join(step.layer for step in steps)
        raise RecipeError(
            f"the network does not run with layers of low rank in the place of {names}: "
            f"{type(error).__name__}: {error}; leave out the step of the layer that it names"
        ) from error
