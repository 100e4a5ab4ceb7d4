"""Costs by arithmetic: what a recipe will weigh and compute, before anything is compressed.

`macs` is exact for convolution and linear layers. `size_bytes` adds what the layers' own tensors take (bits really
packed in the way that takes the fewest bytes, scales, biases) to the rest of the file (graph, index, other tensors),
which is measured on a few exported files and then interpolated. It serves to refuse recipes and to show what is
reachable; the front holds measured bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RecipeError
from ..spaces.recipe import Cluster, Ensemble, Equalize, LowRank, Prune, Quantize, Recipe, Sparsify, pattern_of
from ..spaces.space import Axis
from ..spaces.structure import Layer, Structure, inside, kept_channels, shapes, sides

# What the second node of a layer of low rank adds around its tensors (of float, weight-only and 8-bit layers), and a
# codebook with a BatchNorm's factors beside it: about the same in every network, so that no file is written to learn it.
_SECOND_FLOAT, _SECOND_WEIGHT_ONLY, _SECOND_QUANTIZED, _SECOND_DYNAMIC, _FACTORS = 35.0, 58.0, 115.0, 76.0, 14.0
_GROUPED = 55.0  # what spreads the scales of groups over a weight
# What one scale and a zero point take around a weight, more than scales of the channels do: a node and a number, or a list less.
_AFFINE_FLOAT, _AFFINE_QUANTIZED, _AFFINE_DYNAMIC = 14.0, -9.0, 8.0
_DYNAMIC = -8  # in place of a layer's activation bits: 8, with ranges found at run time

# A whole number, or an array of them: for one recipe, or for many at once.
Whole = Any


@dataclass(frozen=True)
class FileOverhead:
    """Bytes of a packed file outside the layers' tensors, as a linear model of what the file is made of.

    base: of every file. per_layer: for each layer that is there. per_weight_only, per_quantized: more for each layer with
    float and with 8-bit activations. per_region: more for each run of layers with 8-bit activations. any_quantized: more
    when there is one at all. per_dynamic: as per_quantized, where ranges are found at run time. narrowed: more when every group of channels were gone (a negative number). nonzero: by
    layer and by level (bits and sparsity, as `level` writes them) the share of the weights that do not become zero. Few
    bits round weights to zero that no mask asked for, half of them at 2 bits; what is missing keeps all.
    """

    base: float = 0.0
    per_weight_only: float = 0.0
    per_quantized: float = 0.0
    per_layer: float = 0.0
    per_region: float = 0.0
    any_quantized: float = 0.0
    narrowed: float = 0.0
    nonzero: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    per_dynamic: float = 0.0

    def of(self, contents: FileContents) -> Any:
        """The bytes outside the layers' tensors of a file with such contents."""
        return sum(getattr(self, name) * amount for name, amount in vars(contents).items())

    def kept(
        self, layer: str, bits: int, zeros: float | str, equalized: str = "none", affine: bool = False
    ) -> float | None:
        """The share of a layer's weights that are not zero in the file, where it was measured."""
        shares = self.nonzero.get(layer, {})
        plain = shares.get(level(bits, zeros, affine=affine))
        return shares.get(level(bits, zeros, equalized, affine), plain)


@dataclass(frozen=True)
class FileContents:
    """What a file is made of, named by the coefficient of `FileOverhead` that it is counted with."""

    base: Whole
    per_weight_only: Whole
    per_quantized: Whole
    per_layer: Whole
    per_region: Whole
    any_quantized: Whole
    narrowed: Any  # the mean share of the channels that are gone
    per_dynamic: Whole = 0


def contents(structure: Structure, recipe: Recipe) -> FileContents:
    """What the file of a recipe is made of."""
    structure = structure.of(recipe)
    there = shapes(structure, recipe)
    activations = dict.fromkeys((step.layer for step in recipe.of(Cluster)), 32)
    activations |= {
        step.layer: _DYNAMIC if step.activations == "dynamic" else 8 if step.activation_bits < 32 else 32
        for step in recipe.of(Quantize)
    }
    modes = [activations.get(layer.name, 0) for layer in structure.layers if layer.name in there]
    channels = {group.name: group.channels for group in structure.groups}
    return FileContents(
        base=1,
        per_weight_only=modes.count(32),
        per_quantized=modes.count(8),
        per_dynamic=modes.count(_DYNAMIC),
        per_layer=len(modes),
        per_region=sum(mode == 8 != before for before, mode in zip([0, *modes], modes, strict=False)),
        any_quantized=8 in modes,
        narrowed=sum(1 - step.keep / channels[step.group] for step in recipe.of(Prune)) / max(1, len(channels)),
    )


def level(bits: int, zeros: float | str, equalized: str = "none", affine: bool = False) -> str:
    """The name of a level of compression, which JSON can have as a key.

    >>> level(2, 0.5), level(2, 0.5, "weights"), level(4, 0.0, affine=True)
    ('2 bits, 0.5 zeros', '2 bits, 0.5 zeros, equalised by weights', '4 bits, 0 zeros, affine')
    """
    made = f"{bits} bits, {zeros if isinstance(zeros, str) else f'{zeros:g}'} zeros" + ", affine" * affine
    return made if equalized == "none" else f"{made}, equalised by {equalized}"


def _scaled(amount: int, layer: Layer, shape: tuple[int, int]) -> int:
    return amount * shape[0] * shape[1] // (layer.weight_shape[0] * layer.weight_shape[1])


def macs(structure: Structure, recipe: Recipe) -> int:
    """Multiply-adds for one sample in the layers that stay, of all networks of an ensemble."""
    if recipe.of(Ensemble):
        return sum(macs(structure, network) for network in recipe.networks())
    structure = structure.of(recipe)
    sizes = shapes(structure, recipe)
    ranks = {step.layer: step.rank for step in recipe.of(LowRank)}
    total = 0
    for layer in structure.layers:
        if layer.name in ranks and layer.name in sizes:
            total += layer.macs * ranks[layer.name] * sum(sides(layer, sizes[layer.name])) // layer.params
        elif layer.name in sizes:
            total += _scaled(layer.macs, layer, sizes[layer.name])
    return total


def dense_bytes(count: Whole, bits: Whole) -> Whole:
    """Numbers in a row without gaps."""
    return -(-count * bits // 8)


def ternary_bytes(count: Whole) -> Whole:
    """Numbers of {-1, 0, 1}, five to a byte."""
    return -(-count // 5)


def bitmap_bytes(count: Whole, bits: Whole, nonzero: Whole) -> Whole:
    """A bit for each number, then those that are not zero."""
    return dense_bytes(count, 1) + dense_bytes(nonzero, bits)


def position_bits(count: Whole, nonzero: Whole) -> Whole:
    """How many low bits of a position Elias and Fano write down: the binary logarithm of the mean gap, 8 at most.

    >>> int(position_bits(1000, 100)), int(position_bits(1000, 500))
    (3, 1)
    """
    gap = count // np.maximum(nonzero, 1)
    return np.minimum(np.frexp(gap)[1] - 1, 8)


def index_bytes(count: Whole, bits: Whole, nonzero: Whole) -> Whole:
    """The positions of the numbers that are not zero, by Elias and Fano, then those numbers."""
    low = position_bits(count, nonzero)
    return dense_bytes(nonzero, low) + dense_bytes(nonzero + (count - 1 >> low), 1) + dense_bytes(nonzero, bits)


def weight_bytes(count: Whole, bits: Whole, nonzero: Whole, affine: Any = False) -> Whole:
    """Bytes of a packed weight, in the way that takes the fewest (see `runners.files.packing`).

    affine: whether all `2^bits` codes are used, where it is one less: 2 bits are then not ternary.

    >>> [int(weight_bytes(1000, *level)) for level in ((3, 1000), (2, 900), (1, 1000), (8, 500), (4, 100))]
    [375, 200, 125, 625, 116]
    """
    few = np.less_equal(bits, 2) & np.logical_not(affine)
    value = np.where(few, 1, bits)  # a number of {-1, 1} is a bit
    dense = np.where(few & (nonzero < count), ternary_bytes(count), dense_bytes(count, value))
    sparse = np.minimum(bitmap_bytes(count, value, nonzero), index_bytes(count, value, nonzero))
    return np.minimum(dense, sparse)


def shared_bytes(count: Whole, bits: Whole, nonzero: Whole) -> Whole:
    """Bytes of indices, and of their codebook: a float32 for each, but no more than there are weights that differ.

    >>> int(shared_bytes(1000, 4, 1000)), int(shared_bytes(100, 8, 10))
    (564, 61)
    """
    sparse = np.minimum(bitmap_bytes(count, bits, nonzero), index_bytes(count, bits, nonzero))
    entries = np.minimum(2**bits, nonzero + (nonzero < count))
    return np.minimum(dense_bytes(count, bits), sparse) + 4 * entries


def nonzero_weights(count: Whole, inputs: Whole, zeros: float | str) -> Whole:
    """How many of `count` weights a mask leaves: all but a share, or those of a pattern along `inputs` input channels.

    >>> int(nonzero_weights(54, 6, 0.25)), int(nonzero_weights(54, 6, "2:4"))
    (40, 27)
    """
    if not isinstance(zeros, str):
        return count - np.rint(count * zeros).astype(np.int64)
    keep, of = pattern_of(zeros)
    return count // inputs * (inputs // of * keep - (-(inputs % of) * keep // of))


def layer_bytes(structure: Structure, recipe: Recipe, overhead: FileOverhead | None = None) -> int:
    """Bytes of all layers' own tensors: packed weights, scales or codebooks (float32) and biases."""
    structure = structure.of(recipe)
    sizes = shapes(structure, recipe)
    bits = {step.layer: step.weight_bits for step in recipe.of(Quantize)}
    clustered = {step.layer: step.bits for step in recipe.of(Cluster)}
    grouped = {step.layer: step.group_size for step in recipe.of(Quantize) if step.group_size}
    affine = {step.layer for step in recipe.of(Quantize) if step.scheme == "affine"}
    ranks = {step.layer: step.rank for step in recipe.of(LowRank)}
    sparsity: Mapping[str, float | str] = {step.layer: step.pattern or step.ratio for step in recipe.of(Sparsify)}
    overhead = overhead or FileOverhead()
    folded = {layer for layer, _ in structure.folds}
    equalized = next((step.by for step in recipe.of(Equalize)), "none")
    total = 0
    for layer in structure.layers:
        name = layer.name
        if name not in sizes:
            continue
        rows, columns = sides(layer, sizes[name])
        channels = sizes[name][1]
        rank, zeros, width = ranks.get(name), sparsity.get(name, 0.0), bits.get(name, 32)
        share = overhead.kept(name, width, zeros, equalized, name in affine)
        for outputs, inputs, read in [(rank, columns, channels), (rows, rank, rank)] if rank else [(rows, columns, channels)]:  # fmt: skip
            count = outputs * inputs
            nonzero = int(nonzero_weights(count, read, zeros))
            if name in clustered:
                total += int(shared_bytes(count, clustered[name], nonzero))
            else:
                nonzero = nonzero if share is None else round(count * share)
                total += int(weight_bytes(count, width, nonzero, name in affine))
                scales = 1 if name in affine else outputs * -(-inputs // grouped.get(name, inputs))
                total += 4 * scales * (width <= 8)
        # A codebook is one for all channels, so that what a BatchNorm multiplies them by stands beside it.
        total += 4 * rows * (layer.bias + (name in clustered and name in folded))
    return total


def size_bytes(structure: Structure, recipe: Recipe, overhead: FileOverhead) -> int:
    """Bytes of the packed file that the recipe will give, within about 1%.

    The overhead is one network's: for a recipe with a student from a factory it must be the student's. Raises
    `RecipeError` for an ensemble: the graphs of its networks are deflated together, tensors that are equal are stored
    once, and how much that saves no arithmetic knows. Their files are merged in no time (`runners.graphs.merge`).
    """
    if recipe.of(Ensemble):
        raise RecipeError("the bytes of an ensemble cannot be foretold; merge the files of its networks and look")
    structure = structure.of(recipe)
    rest = float(overhead.of(contents(structure, recipe)))
    ranks = {step.layer for step in recipe.of(LowRank)}
    clustered = {step.layer for step in recipe.of(Cluster)}
    dynamic = {step.layer for step in recipe.of(Quantize) if step.activations == "dynamic"}
    quantized = {step.layer for step in recipe.of(Quantize) if step.activation_bits < 32} - dynamic
    weight_only = clustered | {step.layer for step in recipe.of(Quantize) if step.activation_bits == 32}
    rest += _GROUPED * sum(1 + (step.layer in ranks) for step in recipe.of(Quantize) if step.group_size)
    for step in recipe.of(Quantize):
        if step.scheme == "affine":
            static = _AFFINE_QUANTIZED if step.layer in quantized else _AFFINE_FLOAT
            rest += (_AFFINE_DYNAMIC if step.layer in dynamic else static) * (1 + (step.layer in ranks))
    rest += _FACTORS * len(clustered.intersection(layer for layer, _ in structure.folds))
    rest += _SECOND_QUANTIZED * len(ranks & quantized) + _SECOND_WEIGHT_ONLY * len(ranks & weight_only)
    rest += _SECOND_DYNAMIC * len(ranks & dynamic) + _SECOND_FLOAT * len(ranks - quantized - dynamic - weight_only)
    return round(layer_bytes(structure, recipe, overhead) + rest)


# Of many recipes at once, as a function of picks `[recipes, axes]`.
Costs = Callable[[NDArray[np.int64]], dict[str, NDArray[np.float64]]]


def many(
    structure: Structure,
    axes: Sequence[Axis],
    overhead: FileOverhead,
    overheads: Mapping[str, FileOverhead] | None = None,
) -> Costs:
    """`macs` and `size_bytes` of many recipes at once, as a function of picks `[recipes, axes]`.

    A search asks for hundreds of them between two trials; this is `Space.recipe` and the functions above in columns, and
    a test holds it to them exactly. overheads: those of the students' files by name, where the axes choose between networks.
    """
    chooser = next((number for number, axis in enumerate(axes) if axis.kind == "student"), None)
    if chooser is None:
        return _of_one(structure, axes, overhead)
    parts: list[tuple[list[int], Costs]] = []
    for student in axes[chooser].choices:
        name = student.factory if student else ""
        own = [number for number, axis in enumerate(axes) if axis.student == name]
        costs = _of_one(
            structure.named(name), [axes[number] for number in own], (overheads or {})[name] if name else overhead
        )
        parts.append((own, costs))

    def of_each(picks: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        found = {metric: np.zeros(len(picks)) for metric in ("size_bytes", "macs")}
        for choice, (own, costs) in enumerate(parts):
            rows = np.flatnonzero(picks[:, chooser] == choice)
            if len(rows):
                for metric, values in costs(picks[rows][:, own]).items():
                    found[metric][rows] = values
        return found

    return of_each


def _of_one(structure: Structure, axes: Sequence[Axis], overhead: FileOverhead) -> Costs:
    """`many` for the axes of one network."""
    column = {axis.name: number for number, axis in enumerate(axes)}
    owner = {
        (axis.kind, target): axis for axis in axes for target in axis.targets if axis.kind not in ("width", "depth")
    }
    widths = next((axis for axis in axes if axis.kind == "width"), None)
    depths = next(axis for axis in axes if axis.kind == "depth")
    equalizers = next((axis for axis in axes if axis.kind == "equalize"), None)
    folded = {layer for layer, _ in structure.folds}
    dropped = [structure.blocks[:depth] for depth in depths.choices]
    alive = {layer.name: np.array([not inside(layer.name, drop) for drop in dropped]) for layer in structure.layers}

    def pick(picks: NDArray[np.int64], kind: str, target: str) -> NDArray[np.int64]:
        axis = owner.get((kind, target))
        return picks[:, column[axis.name]] if axis else np.zeros(len(picks), dtype=np.int64)

    def listed(kind: str, target: str, default: float) -> tuple[Any, ...]:
        axis = owner.get((kind, target))
        return axis.choices if axis else (default,)

    def choices(kind: str, target: str, default: float) -> NDArray[np.float64]:
        return np.array(listed(kind, target, default), dtype=float)

    def kept_table(name: str) -> NDArray[np.float64]:
        """By scheme (affine or not), equalisation, bits and zeros the share that was measured, NaN where none was."""
        zeros, bits = listed("sparsity", name, 0.0), listed("weight_bits", name, 32)
        ways = equalizers.choices if equalizers else ("none",)
        shares = [
            [[[overhead.kept(name, b, z, by, a) for z in zeros] for b in bits] for by in ways] for a in (False, True)
        ]
        return np.array(shares, dtype=float)

    def keep_table(name: str) -> NDArray[np.int64]:
        group = structure.group(name)
        axis = owner.get(("channels", name))
        return np.array(
            [
                [kept_channels(group.channels, width * (1 - ratio), group.round_to) for ratio in (axis.choices if axis else (0.0,))]
                for width in (widths.choices if widths else (1.0,))
            ]
        )  # fmt: skip

    kept = {layer.name: kept_table(layer.name) for layer in structure.layers}
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
        depth = picks[:, column[depths.name]]
        width = picks[:, column[widths.name]] if widths else np.zeros(len(picks), dtype=np.int64)
        way = picks[:, column[equalizers.name]] if equalizers else np.zeros(len(picks), dtype=np.int64)
        keep = {}
        narrowed = np.zeros(len(picks))
        for group in structure.groups:
            ratio = pick(picks, "channels", group.name)
            keep[group.name] = np.where(made[group.name][depth], tables[group.name][width, ratio], group.channels)
            narrowed += 1 - keep[group.name] / group.channels
        channels = {group.name: group.channels for group in structure.groups}
        size, operations = np.zeros(len(picks)), np.zeros(len(picks))
        weight_only, quantized, dynamic, layers, regions = (np.zeros(len(picks), dtype=np.int64) for _ in range(5))
        before = np.zeros(len(picks), dtype=bool)  # whether the layer before has 8-bit activations
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
            rank = kept_ranks(rows, columns, choices("rank", layer.name, 1.0)[pick(picks, "rank", layer.name)])
            whole = rank == 0
            bit, zero = pick(picks, "weight_bits", layer.name), pick(picks, "sparsity", layer.name)
            bits = choices("weight_bits", layer.name, 32).astype(np.int64)[bit]
            zeros = listed("sparsity", layer.name, 0.0)
            codebook = choices("cluster_bits", layer.name, 32).astype(np.int64)[pick(picks, "cluster_bits", layer.name)]
            clustered = codebook < 32
            factors = clustered & (layer.name in folded)
            activations = choices("activation_bits", layer.name, 32)[pick(picks, "activation_bits", layer.name)]
            how = np.array(listed("activations", layer.name, 0.0))[pick(picks, "activations", layer.name)] == "dynamic"
            eight = (bits <= 8) & (activations < 32) & ~clustered
            late = eight & how & (activations == 8)
            eight = eight & ~late
            few = (bits < 32) | clustered
            size_of = np.array(listed("group_size", layer.name, 0))[pick(picks, "group_size", layer.name)]
            size_of = np.where((bits <= 8) & (activations == 32) & ~clustered, size_of, 0)
            affine = np.array(listed("scheme", layer.name, 0.0))[pick(picks, "scheme", layer.name)] == "affine"
            affine &= (bits > 1) & (bits <= 8) & ~clustered & (size_of == 0)
            second = np.where(few, _SECOND_WEIGHT_ONLY, _SECOND_FLOAT)
            second = np.where(eight, _SECOND_QUANTIZED, np.where(late, _SECOND_DYNAMIC, second))
            second = second + _GROUPED * (size_of > 0)
            grid = np.where(eight, _AFFINE_QUANTIZED, np.where(late, _AFFINE_DYNAMIC, _AFFINE_FLOAT)) * affine
            own = (
                np.where(whole, 0.0, second)
                + grid * np.where(whole, 1, 2)
                + _GROUPED * (size_of > 0)
                + _FACTORS * factors
                + 4 * rows * (int(layer.bias) + factors)
            )
            share = kept[layer.name][affine.astype(np.int64), way, bit, zero]
            matrices = [(np.where(whole, rows, rank), columns, inputs)]
            if ("rank", layer.name) in owner:
                matrices.append((np.where(whole, 0, rows), rank, np.maximum(rank, 1)))
            for out, row, read in matrices:
                count = out * row
                some = np.maximum(count, 1)
                left = np.stack([nonzero_weights(some, read, choice) for choice in zeros])[zero, np.arange(len(picks))]
                nonzero = np.where(np.isnan(share), left, np.rint(some * np.nan_to_num(share))).astype(np.int64)
                nonzero = np.where(bits == 1, some, nonzero)  # a sign is never zero
                groups = np.where(size_of > 0, -(-row // np.maximum(size_of, 1)), 1)
                scales = np.where(affine, 1, out * groups)
                plain = weight_bytes(some, bits, nonzero, affine) + 4 * scales * (bits <= 8)
                if clustered.any():
                    plain = np.where(clustered, shared_bytes(some, np.where(clustered, codebook, 1), left), plain)
                own += np.where(count > 0, plain, 0)
            size += there * own
            weight_only += there & few & ~eight & ~late
            dynamic += there & late
            quantized += there & eight
            layers += there
            regions += there & eight & ~before
            before = np.where(there, eight, before)
            work = np.where(whole, rows * columns, rank * (rows + columns))
            operations += there * (layer.macs * work // layer.params)
        made_of = FileContents(
            1, weight_only, quantized, layers, regions, quantized > 0, narrowed / max(1, len(channels)), dynamic
        )
        return {"size_bytes": np.rint(size + overhead.of(made_of)), "macs": operations}

    return costs
