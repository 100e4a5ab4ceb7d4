"""Costs by arithmetic: what a recipe will weigh and compute, before anything is compressed.

`macs` is exact for convolution and linear layers. `size_bytes` adds what the layers' own tensors take (bits really
packed, scales, biases) to the rest of the file (graph, index, other tensors), which is measured on three exported
files and then interpolated. It serves to refuse recipes and to show what is reachable; the front holds measured bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..spaces.recipe import Prune, Quantize, Recipe, Sparsify, Student
from ..spaces.structure import Layer, Structure, inside


@dataclass(frozen=True)
class FileOverhead:
    """Bytes of a packed file outside the layers' tensors: of a float file, and more per layer in 8- and 32-bit mode."""

    base: float = 0.0
    per_weight_only: float = 0.0
    per_quantized: float = 0.0


def shapes(structure: Structure, recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Output and input channels of each layer that stays."""
    dropped = tuple(name for step in recipe.of(Student) for name in step.drop)
    keep = {step.group: step.keep for step in recipe.of(Prune)}
    channels = {group.name: group.channels for group in structure.groups}
    out = {}
    for layer in structure.layers:
        if inside(layer.name, dropped):
            continue
        outputs = layer.weight_shape[0]
        if (
            layer.output and layer.output in keep
        ):  # a depthwise layer may make several channels from each of its group's
            outputs = outputs * keep[layer.output] // channels[layer.output]
        gone = sum(n - n * keep[group] // channels[group] for group, n in layer.inputs if group in keep)
        inputs = layer.weight_shape[1] if layer.kind == "depthwise" else layer.weight_shape[1] - gone
        out[layer.name] = (outputs, inputs)
    return out


def _scaled(amount: int, layer: Layer, shape: tuple[int, int]) -> int:
    return amount * shape[0] * shape[1] // (layer.weight_shape[0] * layer.weight_shape[1])


def macs(structure: Structure, recipe: Recipe) -> int:
    """Multiply-adds for one sample in the layers that stay."""
    sizes = shapes(structure, recipe)
    return sum(_scaled(layer.macs, layer, sizes[layer.name]) for layer in structure.layers if layer.name in sizes)


def weight_bytes(params: int, bits: int, sparsity: float) -> int:
    """Bytes of one packed weight: dense, or a bitmap and the nonzero values, whichever is less.

    >>> weight_bytes(1000, 3, 0.0), weight_bytes(1000, 8, 0.5)
    (375, 625)
    """
    nonzero = params - round(params * sparsity)
    return min(-(-params * bits // 8), -(-params // 8) + -(-nonzero * bits // 8))


def layer_bytes(structure: Structure, recipe: Recipe) -> int:
    """Bytes of all layers' own tensors: packed weights, scales (float32) and biases."""
    sizes = shapes(structure, recipe)
    bits = {step.layer: step.weight_bits for step in recipe.of(Quantize)}
    sparsity: Mapping[str, float] = {step.layer: step.ratio for step in recipe.of(Sparsify)}
    total = 0
    for layer in structure.layers:
        if layer.name not in sizes:
            continue
        outputs = sizes[layer.name][0]
        width = bits.get(layer.name, 32)
        total += weight_bytes(_scaled(layer.params, layer, sizes[layer.name]), width, sparsity.get(layer.name, 0.0))
        total += 4 * outputs * (layer.bias + (width <= 8))
    return total


def size_bytes(structure: Structure, recipe: Recipe, overhead: FileOverhead) -> int:
    """Bytes of the packed file that the recipe will give, within about 1%."""
    quantized = sum(step.activation_bits == 8 for step in recipe.of(Quantize))
    weight_only = sum(step.activation_bits == 32 for step in recipe.of(Quantize))
    extra = overhead.base + overhead.per_quantized * quantized + overhead.per_weight_only * weight_only
    return round(layer_bytes(structure, recipe) + extra)
