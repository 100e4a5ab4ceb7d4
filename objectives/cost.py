"""Costs by arithmetic: what a recipe will weigh and compute, before anything is compressed.

`macs` is exact for convolution and linear layers. `size_bytes` adds what the layers' own tensors take (bits really
packed, scales, biases) to the rest of the file (graph, index, other tensors), which is measured on three exported
files and then interpolated. It serves to refuse recipes and to show what is reachable; the front holds measured bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..spaces.recipe import Cluster, LowRank, Quantize, Recipe, Sparsify
from ..spaces.space import Axis
from ..spaces.structure import Layer, Structure, inside, kept_channels, shapes, sides

# What the second node of a layer of low rank adds around its tensors (of float, weight-only and 8-bit layers), and a
# codebook with a BatchNorm's factors beside it: about the same in every network, so that no file is written to learn it.
_SECOND_FLOAT, _SECOND_WEIGHT_ONLY, _SECOND_QUANTIZED, _FACTORS = 35.0, 58.0, 115.0, 14.0


@dataclass(frozen=True)
class FileOverhead:
    """Bytes of a packed file outside the layers' tensors: of a float file, and more per layer in 8- and 32-bit mode."""

    base: float = 0.0
    per_weight_only: float = 0.0
    per_quantized: float = 0.0


def _scaled(amount: int, layer: Layer, shape: tuple[int, int]) -> int:
    return amount * shape[0] * shape[1] // (layer.weight_shape[0] * layer.weight_shape[1])


def macs(structure: Structure, recipe: Recipe) -> int:
    """Multiply-adds for one sample in the layers that stay."""
    sizes = shapes(structure, recipe)
    ranks = {step.layer: step.rank for step in recipe.of(LowRank)}
    total = 0
    for layer in structure.layers:
        if layer.name in ranks and layer.name in sizes:
            total += layer.macs * ranks[layer.name] * sum(sides(layer, sizes[layer.name])) // layer.params
        elif layer.name in sizes:
            total += _scaled(layer.macs, layer, sizes[layer.name])
    return total


def weight_bytes(params: int, bits: int, sparsity: float) -> int:
    """Bytes of one packed weight: dense, or a bitmap and the nonzero values, whichever is less.

    >>> weight_bytes(1000, 3, 0.0), weight_bytes(1000, 8, 0.5)
    (375, 625)
    """
    nonzero = params - round(params * sparsity)
    return min(-(-params * bits // 8), -(-params // 8) + -(-nonzero * bits // 8))


def codebook_bytes(params: int, bits: int, sparsity: float) -> int:
    """Bytes of a codebook: a float32 for each index, but no more than there are weights that differ.

    >>> codebook_bytes(1000, 4, 0.0), codebook_bytes(100, 8, 0.9)
    (64, 44)
    """
    nonzero = params - round(params * sparsity)
    return 4 * min(1 << bits, nonzero + (sparsity > 0))


def layer_bytes(structure: Structure, recipe: Recipe) -> int:
    """Bytes of all layers' own tensors: packed weights, scales or codebooks (float32) and biases."""
    sizes = shapes(structure, recipe)
    bits = {step.layer: step.weight_bits for step in recipe.of(Quantize)}
    clustered = {step.layer: step.bits for step in recipe.of(Cluster)}
    ranks = {step.layer: step.rank for step in recipe.of(LowRank)}
    sparsity: Mapping[str, float] = {step.layer: step.ratio for step in recipe.of(Sparsify)}
    folded = {layer for layer, _ in structure.folds}
    total = 0
    for layer in structure.layers:
        name = layer.name
        if name not in sizes:
            continue
        rows, columns = sides(layer, sizes[name])
        rank, zeros = ranks.get(name), sparsity.get(name, 0.0)
        for outputs, inputs in [(rank, columns), (rows, rank)] if rank else [(rows, columns)]:
            if name in clustered:
                total += weight_bytes(outputs * inputs, clustered[name], zeros)
                total += codebook_bytes(outputs * inputs, clustered[name], zeros)
            else:
                width = bits.get(name, 32)
                total += weight_bytes(outputs * inputs, width, zeros) + 4 * outputs * (width <= 8)
        # A codebook is one for all channels, so that what a BatchNorm multiplies them by stands beside it.
        total += 4 * rows * (layer.bias + (name in clustered and name in folded))
    return total


def size_bytes(structure: Structure, recipe: Recipe, overhead: FileOverhead) -> int:
    """Bytes of the packed file that the recipe will give, within about 1%."""
    ranks = {step.layer for step in recipe.of(LowRank)}
    folded = {layer for layer, _ in structure.folds}
    clustered = [step.layer for step in recipe.of(Cluster)]
    quantized = [step.layer for step in recipe.of(Quantize) if step.activation_bits == 8]
    weight_only = clustered + [step.layer for step in recipe.of(Quantize) if step.activation_bits == 32]
    extra = overhead.base + _FACTORS * len(folded.intersection(clustered))
    extra += overhead.per_quantized * len(quantized) + _SECOND_QUANTIZED * len(ranks.intersection(quantized))
    extra += overhead.per_weight_only * len(weight_only) + _SECOND_WEIGHT_ONLY * len(ranks.intersection(weight_only))
    extra += _SECOND_FLOAT * len(ranks.difference(quantized, weight_only))
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
    folded = {layer for layer, _ in structure.folds}
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

    def kept_ranks(
        rows: NDArray[np.int64], columns: NDArray[np.int64], share: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """`kept_rank` for each recipe, 0 where the layer stays whole."""
        full = np.minimum(rows, columns)
        step = np.where(full >= 32, 8, np.where(full >= 16, 4, 1))
        rank = np.minimum(full, step * np.maximum(1, np.rint(full * share / step).astype(np.int64)))
        return np.where((share < 1) & (rank * (rows + columns) < rows * columns), rank, 0)

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
            rows, columns = outputs, inputs * (layer.params // (layer.weight_shape[0] * layer.weight_shape[1]))
            rank = kept_ranks(rows, columns, chosen(picks, "rank", layer.name, 1.0))
            whole = rank == 0
            bits = chosen(picks, "weight_bits", layer.name, 32).astype(np.int64)
            codebook = chosen(picks, "cluster_bits", layer.name, 32).astype(np.int64)
            clustered = codebook < 32
            bits = np.where(clustered, codebook, bits)
            scaled = (bits <= 8) & ~clustered
            zeros = chosen(picks, "sparsity", layer.name, 0.0)
            both = scaled & (chosen(picks, "activation_bits", layer.name, 32) == 8)
            own = np.where(both, overhead.per_quantized, np.where(bits < 32, overhead.per_weight_only, 0.0))
            second = np.where(both, _SECOND_QUANTIZED, np.where(bits < 32, _SECOND_WEIGHT_ONLY, _SECOND_FLOAT))
            own += np.where(whole, 0.0, second) + _FACTORS * (clustered & (layer.name in folded))
            own += 4 * rows * (int(layer.bias) + (clustered & (layer.name in folded)))
            matrices = [(np.where(whole, rows, rank), columns)]
            if ("rank", layer.name) in owner:
                matrices.append((np.where(whole, 0, rows), rank))
            for out, read in matrices:
                weights = out * read
                nonzero = weights - np.rint(weights * zeros).astype(np.int64)
                own += np.minimum(-(-weights * bits // 8), -(-weights // 8) + -(-nonzero * bits // 8))
                own += 4 * out * scaled
                entries = np.minimum(2 ** np.where(clustered, bits, 0), nonzero + ((zeros > 0) & (weights > 0)))
                own += 4 * entries * clustered
            size += there * own
            work = np.where(whole, rows * columns, rank * (rows + columns))
            operations += there * (layer.macs * work // layer.params)
        return {"size_bytes": np.rint(size), "macs": operations}

    return costs
