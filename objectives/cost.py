"""Costs by arithmetic: what a recipe will weigh and compute, before anything is compressed.

`macs` is exact for convolution and linear layers. `size_bytes` adds what the layers' own tensors take (bits really
packed, scales, biases) to the rest of the file (graph, index, other tensors), which is measured on three exported
files and then interpolated. It serves to refuse recipes and to show what is reachable; the front holds measured bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..spaces.recipe import Prune, Quantize, Recipe, Sparsify, Student, pattern_of
from ..spaces.space import Axis
from ..spaces.structure import Layer, Structure, inside, kept_channels


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


def weight_bytes(count: int, bits: int, nonzero: int) -> int:
    """Bytes of one packed weight: dense, or a bitmap and the nonzero values, whichever is less.

    >>> weight_bytes(1000, 3, 1000), weight_bytes(1000, 8, 500)
    (375, 625)
    """
    return min(-(-count * bits // 8), -(-count // 8) + -(-nonzero * bits // 8))


Whole = TypeVar("Whole", int, NDArray[np.int64])


def nonzero_weights(count: Whole, inputs: Whole, zeros: float | str) -> Whole:
    """How many of `count` weights stay: all but a share, or those of a pattern along `inputs` input channels.

    >>> int(nonzero_weights(54, 6, 0.25)), int(nonzero_weights(54, 6, "2:4"))
    (40, 27)
    """
    if not isinstance(zeros, str):
        return count - np.rint(count * zeros).astype(np.int64)  # type: ignore[no-any-return]
    keep, of = pattern_of(zeros)
    return count // inputs * (inputs // of * keep - (-(inputs % of) * keep // of))


def layer_bytes(structure: Structure, recipe: Recipe) -> int:
    """Bytes of all layers' own tensors: packed weights, scales (float32) and biases."""
    sizes = shapes(structure, recipe)
    bits = {step.layer: step.weight_bits for step in recipe.of(Quantize)}
    sparsity: Mapping[str, float | str] = {step.layer: step.pattern or step.ratio for step in recipe.of(Sparsify)}
    total = 0
    for layer in structure.layers:
        if layer.name not in sizes:
            continue
        outputs, inputs = sizes[layer.name]
        width = bits.get(layer.name, 32)
        params = _scaled(layer.params, layer, sizes[layer.name])
        total += weight_bytes(params, width, int(nonzero_weights(params, inputs, sparsity.get(layer.name, 0.0))))
        total += 4 * outputs * (layer.bias + (width <= 8))
    return total


def size_bytes(structure: Structure, recipe: Recipe, overhead: FileOverhead) -> int:
    """Bytes of the packed file that the recipe will give, within about 1%."""
    quantized = sum(step.activation_bits == 8 for step in recipe.of(Quantize))
    weight_only = sum(step.activation_bits == 32 for step in recipe.of(Quantize))
    extra = overhead.base + overhead.per_quantized * quantized + overhead.per_weight_only * weight_only
    return round(layer_bytes(structure, recipe) + extra)


def many(
    structure: Structure, axes: Sequence[Axis], overhead: FileOverhead
) -> Callable[[NDArray[np.int64]], dict[str, NDArray[np.float64]]]:
    """`macs` and `size_bytes` of many recipes at once, as a function of picks `[recipes, axes]`.

    A search asks for hundreds of them between two trials; this is `Space.recipe` and the functions above in columns, and
    a test holds it to them exactly.
    """
    column = {axis.name: number for number, axis in enumerate(axes)}
    owner = {
        (axis.kind, target): axis for axis in axes for target in axis.targets if axis.kind not in ("width", "depth")
    }
    widths = next((axis for axis in axes if axis.kind == "width"), None)
    depths = next(axis for axis in axes if axis.kind == "depth")
    dropped = [structure.blocks[:depth] for depth in depths.choices]
    alive = {layer.name: np.array([not inside(layer.name, drop) for drop in dropped]) for layer in structure.layers}

    def chosen(picks: NDArray[np.int64], kind: str, target: str, default: float) -> NDArray[np.float64]:
        axis = owner.get((kind, target))
        if axis is None:
            return np.full(len(picks), float(default))
        return np.array(axis.choices, dtype=float)[picks[:, column[axis.name]]]

    def keep_table(name: str) -> NDArray[np.int64]:
        group = structure.group(name)
        axis = owner.get(("channels", name))
        return np.array(
            [
                [kept_channels(group.channels, width * (1 - ratio), group.round_to) for ratio in (axis.choices if axis else (0.0,))]
                for width in (widths.choices if widths else (1.0,))
            ]
        )  # fmt: skip

    tables = {group.name: keep_table(group.name) for group in structure.groups}
    made = {
        group.name: np.array(
            [
                any(alive[layer.name][d] for layer in structure.layers if layer.output == group.name)
                for d in range(len(dropped))
            ]
        )
        for group in structure.groups
    }

    def costs(picks: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        depth = picks[:, column["depth"]]
        width = picks[:, column["width"]] if widths else np.zeros(len(picks), dtype=np.int64)
        keep = {}
        for group in structure.groups:
            axis = owner.get(("channels", group.name))
            ratio = picks[:, column[axis.name]] if axis else np.zeros(len(picks), dtype=np.int64)
            keep[group.name] = np.where(made[group.name][depth], tables[group.name][width, ratio], group.channels)
        channels = {group.name: group.channels for group in structure.groups}
        size, operations = np.full(len(picks), float(overhead.base)), np.zeros(len(picks))
        for layer in structure.layers:
            there = alive[layer.name][depth]
            outputs = np.full(len(picks), layer.weight_shape[0])
            if layer.output in keep:
                outputs = outputs * keep[layer.output] // channels[layer.output]
            inputs = np.full(len(picks), layer.weight_shape[1])
            if layer.kind != "depthwise":
                for group_name, n in layer.inputs:
                    if group_name in keep:
                        inputs = inputs - (n - n * keep[group_name] // channels[group_name])
            whole = layer.weight_shape[0] * layer.weight_shape[1]
            params = layer.params * outputs * inputs // whole
            bits = chosen(picks, "weight_bits", layer.name, 32).astype(np.int64)
            axis = owner.get(("sparsity", layer.name))
            left = [nonzero_weights(params, inputs, zeros) for zeros in (axis.choices if axis else (0.0,))]
            nonzero = np.stack(left)[picks[:, column[axis.name]] if axis else 0, np.arange(len(picks))]
            packed = np.minimum(-(-params * bits // 8), -(-params // 8) + -(-nonzero * bits // 8))
            both = (bits <= 8) & (chosen(picks, "activation_bits", layer.name, 32) == 8)
            extra = np.where(both, overhead.per_quantized, np.where(bits < 32, overhead.per_weight_only, 0.0))
            size += there * (packed + 4 * outputs * (int(layer.bias) + (bits <= 8)) + extra)
            operations += there * (layer.macs * outputs * inputs // whole)
        return {"size_bytes": np.rint(size), "macs": operations}

    return costs
