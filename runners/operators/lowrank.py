"""A layer as two thinner ones: the best approximation of its weight by a matrix of low rank.

The weight is read as the matrix `[outputs, inputs * kernel]`. A linear layer becomes two linear layers, a convolution its
own kernel from the inputs to `rank` channels and then a 1 x 1 convolution to the outputs (Zhang et al., TPAMI 2016). The
other usual cut, k x 1 and then 1 x k (Jaderberg et al., 2014), is not made: it needs more per rank where there are many
channels, does nothing for 1 x 1 convolutions, and runs as kernels that runtimes are not written for. This one is exact at
full rank for every stride, padding and dilation, and the second layer has the outputs, the bias and the BatchNorm of the
old one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...errors import RecipeError
from ...spaces.techniques.lowrank import LowRank


class Factored(nn.Sequential):
    """The two layers in the place of one; steps of a recipe that name the one mean both."""


@torch.no_grad()
def basis(weight: Tensor) -> Tensor:
    """The singular vectors of a weight on its shorter side, `[side, side]` in float64, those of the largest values first.

    They are the eigenvectors of the smaller Gram matrix, which takes a fifth of the time of a decomposition in float32 for
    512 x 4608. All ranks come out of one basis.
    """
    matrix = weight.detach().flatten(1).double()
    matrix = matrix if _wide(matrix) else matrix.T
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)
    # A vector may come with either sign; the sign of its largest component makes it one of the two.
    signed: Tensor = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return signed


@torch.no_grad()
def factors(weight: Tensor, rank: int, vectors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`(first, second)` of shapes `[rank, columns]` and `[rows, rank]` whose product is nearest to a weight.

    weight: `[rows, ...]`, all axes but the first taken together. vectors: its `basis`, where that is known. `second @
    first` is the weight's projection on the first `rank` of them: the truncated singular value decomposition, which no
    matrix of this rank is nearer to in the Frobenius norm (Eckart & Young 1936). Each factor has the square root of the
    singular values.

        >>> first, second = factors(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1)
        >>> (second @ first).round(decimals=5).abs().tolist()
        [[3.0, 0.0], [0.0, 0.0]]
    """
    matrix = weight.detach().flatten(1).double()
    wide = _wide(matrix)
    kept = (basis(weight) if vectors is None else vectors)[:, :rank]
    rest = kept.T @ (matrix if wide else matrix.T)
    roots = rest.norm(dim=1).sqrt()
    one, other = (rest / torch.where(roots > 0, roots, 1.0)[:, None]).to(weight), (kept * roots).to(weight)
    return (one, other) if wide else (other.T.contiguous(), one.T.contiguous())


def _wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def factored(layer: nn.Module, rank: int, vectors: Tensor | None = None) -> Factored:
    """Two layers that compute what a convolution (of one group) or a linear layer does with its weight at `rank`.

    vectors: the weight's `basis`, where that is known.
    """
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear)
    first, second = factors(layer.weight, rank, vectors)
    pair: tuple[nn.Module, nn.Module]
    if isinstance(layer, nn.Linear):
        pair = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features)
    else:
        kind = type(layer)
        pair = (
            kind(
                layer.in_channels,
                rank,
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,  # type: ignore[arg-type]
                layer.padding,  # type: ignore[arg-type]
                layer.dilation,  # type: ignore[arg-type]
                bias=False,
                padding_mode=layer.padding_mode,
            ),
            kind(rank, layer.out_channels, 1),
        )
    one, other = pair
    one.weight = nn.Parameter(first.view(rank, *layer.weight.shape[1:]))
    other.weight = nn.Parameter(second.view(len(second), rank, *[1] * (layer.weight.ndim - 2)))
    other.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
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
        assert isinstance(layer.weight, Tensor)
        model.set_submodule(step.layer, factored(layer, step.rank, basis_of(layer.weight)))
    try:
        with torch.no_grad():
            model(example)
    except Exception as error:  # whatever a network raises that reads its layers' attributes itself
        names = ", ".join(step.layer for step in steps)
        raise RecipeError(
            f"the network does not run with layers of low rank in the place of {names}: "
            f"{type(error).__name__}: {error}; leave out the step of the layer that it names"
        ) from error
