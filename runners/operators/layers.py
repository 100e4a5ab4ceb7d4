"""The kinds of layers that can be compressed, in one table: what the rest of paretorch knows of a layer it asks here.

A `LayerKind` is plain data and a few functions. A new kind is one more entry of `KINDS`; no other module tests the type
of a layer, names a layer class except to create one, or knows which axis of a stored weight holds the outputs.

Everywhere else a weight is *output-first*, `[outputs, inputs of a group, kernel positions ...]`: `weight_of` gives it
and `set_weight` takes it back, whatever the order in which the module stores it. What works on such a weight
(rounding, zeros, ranges, low rank) uses `OUTPUT`, `INPUT` and the functions beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OUTPUT, INPUT = 0, 1  # the axes of an output-first weight; all others are kernel positions
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMALIZATIONS = (*BATCHNORMS, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d)


@dataclass(frozen=True)
class OnnxOperator:
    """An ONNX operator that computes a kind of layer, and where the layer's numbers are in its node.

    Attributes:
        name: The operator's type.
        weight_axis: The axis of the weight along which the output channels are.
        channel_axis: The axis of the channels in the result.
        weight: The place of the weight among the node's inputs.
        bias: The place of the bias, or None where an Add behind the node adds it.
        transposed_by: The attribute that transposes the weight when it is set; "" for none.
        product: Whether it is a plain matrix product, which other products may replace.
    """

    name: str
    weight_axis: int
    channel_axis: int
    weight: int = 1
    bias: int | None = 2
    transposed_by: str = ""
    product: bool = False

    def output_axis(self, attributes: Mapping[str, Any], dimensions: int) -> int:
        """The axis of the output channels in a weight of so many dimensions, of a node with these attributes.

        >>> ONNX["Gemm"].output_axis({"transB": 1}, 2), ONNX["Gemm"].output_axis({}, 2), ONNX["Conv"].output_axis({}, 4)
        (0, 1, 0)
        """
        axis = self.weight_axis % dimensions
        return dimensions - 1 - axis if self.transposed_by and attributes.get(self.transposed_by) else axis


@dataclass(frozen=True)
class LayerKind:
    """All that is known of a kind of layer.

    Attributes:
        types: The module classes.
        name: What `spaces.structure.Layer.kind` calls a layer of this kind.
        output_axis, input_axis: The axes of the stored weight: 0 and 1, or 1 and 0. Output channels are ordered by
            group.
        channel_axis: The axis of the channels in inputs and outputs: 1, or -1.
        channels: Gives `(input channels, output channels)`.
        groups: Gives the number of groups: each group of outputs reads its own group of inputs.
        functions: The names of the functions of torch that compute it.
        macs: Gives the multiply-adds for one sample, from the shapes of a batch of inputs and of its outputs.
        patches: Gives what each row of the weight is multiplied with, `[groups, inputs, positions]`, for a batch of
            inputs.
        factors: Makes two layers with so many channels between them that may replace the layer, the second with a
            bias; None where a layer of this kind cannot be factored.
        onnx: The operators that it is exported as.
        weight, bias: The names of its parameters.
    """

    types: tuple[type[nn.Module], ...]
    name: Callable[[nn.Module], str]
    output_axis: int
    input_axis: int
    channel_axis: int
    channels: Callable[[nn.Module], tuple[int, int]]
    groups: Callable[[nn.Module], int]
    functions: tuple[str, ...]
    macs: Callable[[nn.Module, torch.Size, torch.Size], int]
    patches: Callable[[nn.Module, Tensor], Tensor]
    factors: Callable[[nn.Module, int], tuple[nn.Module, nn.Module]] | None
    onnx: tuple[OnnxOperator, ...]
    weight: str = "weight"
    bias: str = "bias"

    def output_first(self, stored: Tensor, groups: int = 1) -> Tensor:
        """A stored weight (or what has its shape) as `[outputs, inputs of a group, ...]`, a view if possible."""
        return stored if self.output_axis == OUTPUT else _turned(stored, groups)

    def stored(self, weight: Tensor, groups: int = 1) -> Tensor:
        """The reverse of `output_first`."""
        return weight if self.output_axis == OUTPUT else _turned(weight, groups)


def _turned(weight: Tensor, groups: int) -> Tensor:
    """`[groups * first, second, ...]` as `[groups * second, first, ...]`."""
    first, second, *kernel = weight.shape
    parts = weight.reshape(groups, first // groups, second, *kernel).transpose(1, 2)
    return parts.reshape(groups * second, first // groups, *kernel)


# ------------------------------------------------------------------------------------------------- convolutions


def _convolution_name(layer: nn.Module) -> str:
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    return "conv" if layer.groups == 1 else "depthwise" if layer.groups == layer.in_channels else "grouped"


def _convolution_channels(layer: nn.Module) -> tuple[int, int]:
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    return layer.in_channels, layer.out_channels


def _convolution_groups(layer: nn.Module) -> int:
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    return layer.groups


def _convolution_patches(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    if isinstance(layer, nn.Conv1d):
        x, kernel, dilation, stride = x.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)
    unfolded = F.unfold(x, kernel, dilation, 0, stride)  # [images, channels * kernel, positions]
    images, inputs, positions = unfolded.shape
    grouped = unfolded.view(images, layer.groups, inputs // layer.groups, positions)
    return grouped.permute(1, 2, 0, 3).reshape(layer.groups, inputs // layer.groups, images * positions)


def _convolution_factors(layer: nn.Module, rank: int) -> tuple[nn.Module, nn.Module]:
    """The layer's own kernel from the inputs to `rank` channels, then a kernel of 1."""
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    kind: Callable[..., nn.Module] = type(layer)
    first = kind(
        layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        bias=False, padding_mode=layer.padding_mode,
    )  # fmt: skip  # one argument a line is twice as long
    return first, kind(rank, layer.out_channels, 1)


def _macs_by_output(layer: nn.Module, given: torch.Size, made: torch.Size) -> int:
    """Every weight is used once at each position of the output."""
    positions = made.numel() // given[0] // channels_of(layer)[1]
    return parameter_of(layer).numel() * positions


CONVOLUTION = LayerKind(
    types=(nn.Conv1d, nn.Conv2d),
    name=_convolution_name,
    output_axis=0,
    input_axis=1,
    channel_axis=1,
    channels=_convolution_channels,
    groups=_convolution_groups,
    functions=("conv1d", "conv2d"),
    macs=_macs_by_output,
    patches=_convolution_patches,
    factors=_convolution_factors,
    onnx=(OnnxOperator("Conv", weight_axis=0, channel_axis=1),),
)


# ------------------------------------------------------------------------------------------------ linear layers


def _linear_channels(layer: nn.Module) -> tuple[int, int]:
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def _linear_patches(layer: nn.Module, x: Tensor) -> Tensor:
    return x.reshape(1, -1, x.shape[-1]).transpose(1, 2)


def _linear_factors(layer: nn.Module, rank: int) -> tuple[nn.Module, nn.Module]:
    assert isinstance(layer, nn.Linear)
    return nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features)


LINEAR = LayerKind(
    types=(nn.Linear,),
    name=lambda layer: "linear",
    output_axis=0,
    input_axis=1,
    channel_axis=-1,
    channels=_linear_channels,
    groups=lambda layer: 1,
    functions=("linear",),
    macs=_macs_by_output,
    patches=_linear_patches,
    factors=_linear_factors,
    onnx=(
        OnnxOperator("Gemm", weight_axis=-1, channel_axis=-1, transposed_by="transB", product=True),
        OnnxOperator("MatMul", weight_axis=-1, channel_axis=-1, bias=None, product=True),
    ),
)

KINDS: tuple[LayerKind, ...] = (CONVOLUTION, LINEAR)
TYPES = tuple(one for kind in KINDS for one in kind.types)
FUNCTIONS = frozenset(function for kind in KINDS for function in kind.functions)
ONNX = {operator.name: operator for kind in KINDS for operator in kind.onnx}


# ------------------------------------------------------------------------------------------- what is asked of a layer


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a layer that can be compressed."""
    return isinstance(module, TYPES)


def kind_of(layer: nn.Module) -> LayerKind:
    """The kind of a layer.

    Raises:
        TypeError: The module is no layer of the table.

    Example:
        >>> kind_of(nn.Conv2d(4, 6, 3, groups=2)).name(nn.Conv2d(4, 6, 3, groups=2))
        'grouped'
    """
    for kind in KINDS:
        if isinstance(layer, kind.types):
            return kind
    raise TypeError(f"{type(layer).__name__} is no layer; layers: {', '.join(one.__name__ for one in TYPES)}")


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """All layers of a network, by name."""
    return {name: module for name, module in model.named_modules() if is_layer(module)}


def channels_of(layer: nn.Module) -> tuple[int, int]:
    """`(input channels, output channels)`."""
    return kind_of(layer).channels(layer)


def groups_of(layer: nn.Module) -> int:
    return kind_of(layer).groups(layer)


def parameter_of(layer: nn.Module) -> Tensor:
    """The weight as the module stores it."""
    weight = getattr(layer, kind_of(layer).weight)
    assert isinstance(weight, Tensor)
    return weight


def weight_of(layer: nn.Module) -> Tensor:
    """The weight, output-first; the parameter itself where it is stored so."""
    return output_first(layer, parameter_of(layer))


def output_first(layer: nn.Module, stored: Tensor) -> Tensor:
    """What has the shape of a layer's stored weight (its gradient, for example), output-first."""
    return kind_of(layer).output_first(stored, groups_of(layer))


def set_weight(layer: nn.Module, weight: Tensor) -> None:
    """Write an output-first weight into the layer's own, in place."""
    parameter_of(layer).copy_(kind_of(layer).stored(weight, groups_of(layer)))


def replace_weight(layer: nn.Module, weight: Tensor) -> None:
    """Give a layer an output-first weight as a new parameter of that weight's dtype."""
    kind = kind_of(layer)
    setattr(layer, kind.weight, nn.Parameter(kind.stored(weight, kind.groups(layer))))


def bias_of(layer: nn.Module) -> Tensor | None:
    bias = getattr(layer, kind_of(layer).bias)
    assert bias is None or isinstance(bias, Tensor)
    return bias


def replace_bias(layer: nn.Module, bias: Tensor | None) -> None:
    """Give a layer another bias as a new parameter, or none."""
    setattr(layer, kind_of(layer).bias, None if bias is None else nn.Parameter(bias.clone()))


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """What each row of the layer's weight is multiplied with, `[groups, inputs, positions]`.

    Example:
        >>> layer, x = nn.Conv2d(4, 6, 3, groups=2), torch.randn(5, 4, 7, 7)
        >>> outputs = as_matrix(weight_of(layer), 2) @ patches(layer, x) + layer.bias.view(2, 3, 1)
        >>> torch.allclose(outputs.view(6, 5, 25).transpose(0, 1).reshape(5, 6, 5, 5), layer(x), atol=1e-5)
        True
    """
    return kind_of(layer).patches(layer, x)


def samples(layer: nn.Module, x: Tensor) -> Tensor:
    """A batch of inputs that may be split along its first axis; with channels last every position is a sample."""
    return x.reshape(-1, x.shape[-1]) if kind_of(layer).channel_axis == -1 else x


def channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    """Inputs or outputs of a layer as `[..., channels]`."""
    return x.movedim(kind_of(layer).channel_axis, -1)


def per_channel(layer: nn.Module, values: Tensor, x: Tensor) -> Tensor:
    """Values `[channels]` in a shape that broadcasts over the inputs or outputs of a layer."""
    return values.view(-1, *[1] * (0 if kind_of(layer).channel_axis == -1 else x.ndim - 2))


# --------------------------------------------------------------------------------------------- output-first weights


def as_matrix(weight: Tensor, groups: int) -> Tensor:
    """An output-first weight as `[groups, outputs of a group, inputs]`, a view where possible.

    Inputs are input channels times kernel positions, in the order of `patches`.
    """
    return weight.detach().reshape(groups, weight.shape[OUTPUT] // groups, -1)


def from_matrix(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The reverse of `as_matrix`, for a weight of this shape."""
    return matrix.reshape(shape)


def rows(weight: Tensor) -> Tensor:
    """An output-first weight as `[outputs, inputs of a group * kernel positions]`, detached."""
    return weight.detach().flatten(INPUT)


def row_shape(weight: Tensor) -> tuple[int, int]:
    """`(input channels of a group, kernel positions)` of an output-first weight."""
    return weight.shape[INPUT], weight.shape[INPUT + 1 :].numel()


def per_output(values: Tensor, weight: Tensor) -> Tensor:
    """Values `[outputs]` in a shape that broadcasts over an output-first weight."""
    return values.view(-1, *[1] * (weight.ndim - 1))
