"""Costs by arithmetic: what a recipe will weigh and compute, before anything is compressed.

`macs` is exact for convolution and linear layers. `size_bytes` adds what the layers' own tensors take (bits really
packed in the way that takes the fewest bytes, scales, biases) to the rest of the file (graph, index, other tensors),
which is measured on a few exported files and then interpolated. It serves to refuse recipes and to show what is
reachable; the front holds measured bytes.

The arithmetic exists once, over arrays `[recipes, layers]` (`_LayerTable`): of one row for a recipe, of many for the
picks that a search compares. Both are filled from the steps of a layer, by what its technique says of how the weight is
stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RecipeError
from ..spaces.recipe import Recipe
from ..spaces.rules import Axis
from ..spaces.shapes import channels_of, shapes
from ..spaces.steps import LayerStep, Step
from ..spaces.structure import Layer, Structure, inside
from ..spaces.techniques.ensemble import Ensemble
from ..spaces.techniques.equalize import Equalize
from ..spaces.techniques.prune import Prune, kept, makers
from ..spaces.techniques.student import blocks
from ..spaces.techniques.table import form_of, layer_steps
from ..spaces.techniques.technique import WeightForm
from .storage import Whole, left_by_mask, mask_numbers, shared_bytes, weight_bytes

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
# Of many recipes at once, as a function of picks `[recipes, axes]`.
Costs = Callable[[Ints], dict[str, Floats]]

# By what a layer is fed: what the second node of a layer of low rank adds around its tensors, and what one scale and a
# zero point take more than scales of the channels do: a node and a number, or a list less. About the same in every
# network, so that no file is written to learn it.
_INPUTS = ("plain", "float", "static", "dynamic")
_SECOND = np.array([35.0, 58.0, 115.0, 76.0])
_AFFINE = np.array([0.0, 14.0, -9.0, 8.0])
_FACTORS = 14.0  # a BatchNorm's factors beside a codebook
_GROUPED = 55.0  # what spreads the scales of groups over a weight


@dataclass(frozen=True)
class FileOverhead:
    """Bytes of a packed file outside the layers' tensors, as a linear model of what the file is made of.

    base: of every file. per_layer: for each layer that is there. per_weight_only, per_quantized: more for each layer
    with float and with 8-bit activations. per_region: more for each run of layers with 8-bit activations.
    any_quantized: more when there is one at all. per_dynamic: as per_quantized, where ranges are found at run time.
    narrowed: more when every group of channels were gone (a negative number). nonzero: by layer and by level (bits and
    sparsity, as `level` writes them) the share of the weights that do not become zero. Few bits round weights to zero
    that no mask asked for, half of them at 2 bits; what is missing keeps all.
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
        shares = self.nonzero.get(layer)
        if not shares:
            return None
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
    table = _of_recipe(structure.of(recipe), recipe, FileOverhead())
    return FileContents(**{name: np.asarray(amount).item() for name, amount in vars(table.contents()).items()})


def level(bits: int, zeros: float | str, equalized: str = "none", affine: bool = False) -> str:
    """The name of a level of compression, which JSON can have as a key.

    >>> level(2, 0.5), level(2, 0.5, "weights"), level(4, 0.0, affine=True)
    ('2 bits, 0.5 zeros', '2 bits, 0.5 zeros, equalised by weights', '4 bits, 0 zeros, affine')
    """
    made = f"{bits} bits, {zeros if isinstance(zeros, str) else f'{zeros:g}'} zeros" + ", affine" * affine
    return made if equalized == "none" else f"{made}, equalised by {equalized}"


def macs(structure: Structure, recipe: Recipe) -> int:
    """Multiply-adds for one sample in the layers that stay, of all networks of an ensemble."""
    if recipe.of(Ensemble):
        return sum(macs(structure, network) for network in recipe.networks())
    return int(_of_recipe(structure.of(recipe), recipe, FileOverhead()).macs()[0])


def layer_bytes(structure: Structure, recipe: Recipe, overhead: FileOverhead | None = None) -> int:
    """Bytes of all layers' own tensors: packed weights, scales or codebooks (float32) and biases."""
    return int(_of_recipe(structure.of(recipe), recipe, overhead or FileOverhead()).bytes()[0])


def size_bytes(structure: Structure, recipe: Recipe, overhead: FileOverhead) -> int:
    """Bytes of the packed file that the recipe will give, within about 1%.

    The overhead is one network's: for a recipe with a student from a factory it must be the student's. Raises
    `RecipeError` for an ensemble: the graphs of its networks are deflated together, tensors that are equal are stored
    once, and how much that saves no arithmetic knows. Their files are merged in no time (`runners.graphs.merge`).
    """
    if recipe.of(Ensemble):
        raise RecipeError("the bytes of an ensemble cannot be foretold; merge the files of its networks and look")
    return int(_of_recipe(structure.of(recipe), recipe, overhead).size(overhead)[0])


# One layer's `WeightForm` in numbers, with the share of its weights that was measured not to become zero, or NaN.
_FORM = np.dtype(
    [
        ("bits", np.int64),
        ("codebook", bool),
        ("share", float),
        ("keep", np.int64),
        ("of", np.int64),
        ("rank", np.int64),
        ("inputs", np.int64),
        ("group_size", np.int64),
        ("affine", bool),
        ("measured", float),
    ]
)


def _numbers(layer: Layer, form: WeightForm, overhead: FileOverhead, equalized: str) -> tuple[Any, ...]:
    # In a codebook what rounding makes zero has an index like any other.
    measured = None if form.codebook else overhead.kept(layer.name, form.bits, form.zeros, equalized, form.affine)
    inputs = _INPUTS.index(form.inputs)
    share = np.nan if measured is None else measured
    return (form.bits, form.codebook, *mask_numbers(form.zeros), form.rank, inputs, form.group_size, form.affine, share)


@dataclass(frozen=True)
class _LayerTable:
    """The layers of recipes that begin with one network, as arrays `[recipes, layers]`.

    there: which layers stay. outputs, inputs: channels. form: `_FORM`. narrowed: the mean share of channels that are
    gone, `[recipes]`.
    """

    structure: Structure
    there: Bools
    outputs: Ints
    inputs: Ints
    form: NDArray[np.void]
    narrowed: Floats

    def _each(self, number: Callable[[Layer], float]) -> NDArray[Any]:
        return np.array([number(layer) for layer in self.structure.layers])

    @property
    def columns(self) -> Ints:
        """Of the weight as a matrix."""
        shapes_of = [layer.weight_shape for layer in self.structure.layers]
        kernels = [
            layer.params // (shape[0] * shape[1]) for layer, shape in zip(self.structure.layers, shapes_of, strict=True)
        ]
        return np.asarray(self.inputs * np.array(kernels))

    def macs(self) -> Ints:
        """Multiply-adds for one sample."""
        rank, columns = self.form["rank"], self.columns
        work = np.where(rank == 0, self.outputs * columns, rank * (self.outputs + columns))
        each = self._each(lambda layer: layer.macs) * work // self._each(lambda layer: layer.params)
        return np.asarray((self.there * each).sum(1))

    def bytes(self) -> Ints:
        """Of the layers' own tensors."""
        form, columns, rank = self.form, self.columns, self.form["rank"]
        folded = {layer for layer, _ in self.structure.folds}
        # A codebook is one for all channels, so that what a BatchNorm multiplies them by stands beside it.
        factors = form["codebook"] & self._each(lambda layer: layer.name in folded)
        total = 4 * self.outputs * (self._each(lambda layer: int(layer.bias)) + factors)
        total += self._matrix_bytes(np.where(rank == 0, self.outputs, rank), columns, self.inputs)
        if rank.any():
            second = self._matrix_bytes(self.outputs, np.maximum(rank, 1), np.maximum(rank, 1))
            total += np.where(rank == 0, 0, second)
        return np.asarray((self.there * total).sum(1))

    def _matrix_bytes(self, rows: Ints, columns: Ints, inputs: Ints) -> Ints:
        """A weight of `rows` outputs by `columns`, of so many `inputs` channels, with its scales."""
        form = self.form
        bits, affine, group_size = form["bits"], form["affine"], form["group_size"]
        count = rows * columns
        left = left_by_mask(count, inputs, form["share"], form["keep"], form["of"])
        nonzero = np.where(np.isnan(form["measured"]), left, np.rint(count * np.nan_to_num(form["measured"])))
        groups = np.where(group_size > 0, -(-columns // np.maximum(group_size, 1)), 1)
        scales = np.where(affine, 1, rows * groups)
        size = weight_bytes(count, bits, nonzero.astype(np.int64), affine) + 4 * scales * (bits <= 8)
        if form["codebook"].any():
            size = np.where(form["codebook"], shared_bytes(count, bits, left), size)
        return np.asarray(size)

    def contents(self) -> FileContents:
        """What the files are made of, apart from these tensors."""
        inputs = np.where(self.there, self.form["inputs"], 0)
        quantized = inputs == _INPUTS.index("static")
        # A region begins where the layer before, of those that are there, has no static 8-bit inputs.
        regions, before = np.zeros(len(inputs), dtype=np.int64), np.zeros(len(inputs), dtype=bool)
        for here, now in zip(self.there.T, quantized.T, strict=True):
            regions += now & ~before
            before = np.where(here, now, before)
        return FileContents(
            base=np.ones(len(inputs), dtype=np.int64),
            per_weight_only=(inputs == _INPUTS.index("float")).sum(1),
            per_quantized=quantized.sum(1),
            per_dynamic=(inputs == _INPUTS.index("dynamic")).sum(1),
            per_layer=self.there.sum(1),
            per_region=regions,
            any_quantized=quantized.any(1),
            narrowed=self.narrowed,
        )

    def size(self, overhead: FileOverhead) -> Floats:
        """Bytes of the files, rounded."""
        form, folded = self.form, {layer for layer, _ in self.structure.folds}
        nodes = 1 + (form["rank"] > 0)
        around = _SECOND[form["inputs"]] * (form["rank"] > 0) + _GROUPED * nodes * (form["group_size"] > 0)
        around += _AFFINE[form["inputs"]] * nodes * form["affine"]
        around += _FACTORS * (form["codebook"] & self._each(lambda layer: layer.name in folded))
        rest = overhead.of(self.contents()) + (self.there * around).sum(1)
        return np.asarray(np.rint(self.bytes() + rest))


def _of_recipe(structure: Structure, recipe: Recipe, overhead: FileOverhead) -> _LayerTable:
    """The table of one recipe. structure: of the network that it begins with."""
    sizes = shapes(structure, recipe)
    equalized = next((step.by for step in recipe.of(Equalize)), "none")
    steps: dict[str, list[Step]] = {}
    for step in recipe.of(LayerStep):
        steps.setdefault(step.layer, []).append(step)
    forms = [_numbers(layer, form_of(steps.get(layer.name, ())), overhead, equalized) for layer in structure.layers]
    whole = [layer.weight_shape[:2] for layer in structure.layers]
    channels = [sizes.get(layer.name, shape) for layer, shape in zip(structure.layers, whole, strict=True)]
    groups = {group.name: group.channels for group in structure.groups}
    gone = sum(1 - step.keep / groups[step.group] for step in recipe.of(Prune))
    return _LayerTable(
        structure,
        np.array([[layer.name in sizes for layer in structure.layers]]),
        np.array([[outputs for outputs, _ in channels]]),
        np.array([[inputs for _, inputs in channels]]),
        np.array([forms], dtype=_FORM),
        np.array([gone / max(1, len(groups))]),
    )


def many(
    structure: Structure,
    axes: Sequence[Axis],
    overhead: FileOverhead,
    overheads: Mapping[str, FileOverhead] | None = None,
) -> Costs:
    """`macs` and `size_bytes` of many recipes at once, as a function of picks `[recipes, axes]`.

    A search asks for hundreds of them between two trials. overheads: those of the students' files by name, where the
    axes choose between networks.
    """
    chooser = next((number for number, axis in enumerate(axes) if axis.kind == "student"), None)
    if chooser is None:
        return _Many(structure, axes, overhead)
    parts: list[tuple[list[int], Costs]] = []
    for student in axes[chooser].choices:
        name = student.factory if student else ""
        own = [number for number, axis in enumerate(axes) if axis.student == name]
        costs = _Many(
            structure.named(name), [axes[number] for number in own], (overheads or {})[name] if name else overhead
        )
        parts.append((own, costs))

    def of_each(picks: Ints) -> dict[str, Floats]:
        costs_of = {metric: np.zeros(len(picks)) for metric in ("size_bytes", "macs")}
        for choice, (own, costs) in enumerate(parts):
            rows = np.flatnonzero(picks[:, chooser] == choice)
            if len(rows):
                for metric, values in costs(picks[rows][:, own]).items():
                    costs_of[metric][rows] = values
        return costs_of

    return of_each


class _Many:
    """`many` for the axes of one network.

    Which steps the choices of a layer become is asked once for every combination of them that occurs, and then looked
    up.
    """

    def __init__(self, structure: Structure, axes: Sequence[Axis], overhead: FileOverhead) -> None:
        self.structure, self.overhead = structure, overhead
        self.axes = list(axes)
        self.column = {(axis.kind, target): n for n, axis in enumerate(axes) for target in axis.targets}
        self.single = {axis.kind: n for n, axis in enumerate(axes)}
        self.known: dict[str, dict[int, tuple[Any, ...]]] = {layer.name: {} for layer in structure.layers}
        # By choice of depth.
        self.dropped = [blocks(structure, depth) for depth in self.axes[self.single["depth"]].choices]
        self.alive = np.array([[not inside(x.name, drop) for x in structure.layers] for drop in self.dropped])
        self.equalizable = np.array([structure.equalizable(drop) for drop in self.dropped])
        made = [makers(structure, drop) for drop in self.dropped]
        self.made = {g.name: np.array([g.name in names for names in made]) for g in structure.groups}
        widths, shares = self._choices("width", (1.0,)), {g.name: self._removed(g.name) for g in structure.groups}
        self.kept = {
            g.name: np.array([[kept(g, width, share) for share in shares[g.name]] for width in widths])
            for g in structure.groups
        }
        # By layer the axes that it has a choice of its own in.
        self.own = {
            layer.name: [n for (kind, target), n in self.column.items() if target == layer.name and kind != "channels"]
            for layer in structure.layers
        }

    def _choices(self, kind: str, default: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.axes[self.single[kind]].choices if kind in self.single else default

    def _removed(self, group: str) -> tuple[float, ...]:
        number = self.column.get(("channels", group))
        return (0.0,) if number is None else self.axes[number].choices

    def _pick(self, picks: Ints, number: int | None) -> Ints:
        return np.zeros(len(picks), dtype=np.int64) if number is None else picks[:, number]

    def __call__(self, picks: Ints) -> dict[str, Floats]:
        """`macs` and `size_bytes` of picks `[recipes, axes]`."""
        structure = self.structure
        depth, width = (self._pick(picks, self.single.get(kind)) for kind in ("depth", "width"))
        equalized = np.where(self.equalizable[depth], self._pick(picks, self.single.get("equalize")), -1)
        keep: dict[str, Ints] = {}
        narrowed = np.zeros(len(picks))
        for group in structure.groups:
            removed = self._pick(picks, self.column.get(("channels", group.name)))
            there = self.made[group.name][depth]
            keep[group.name] = np.where(there, self.kept[group.name][width, removed], group.channels)
            narrowed += 1 - keep[group.name] / group.channels
        channels = {group.name: group.channels for group in structure.groups}
        blank = np.zeros(len(picks), dtype=np.int64)
        sizes = [channels_of(layer, keep, channels) for layer in structure.layers]
        outputs = np.stack([blank + size[0] for size in sizes], 1)
        inputs = np.stack([blank + size[1] for size in sizes], 1)
        forms = [
            self._forms(layer, picks, outputs[:, n], inputs[:, n], equalized)
            for n, layer in enumerate(structure.layers)
        ]
        table = _LayerTable(
            structure, self.alive[depth], outputs, inputs, np.stack(forms, 1), narrowed / max(1, len(channels))
        )
        return {"size_bytes": table.size(self.overhead), "macs": table.macs().astype(float)}

    def _forms(self, layer: Layer, picks: Ints, outputs: Ints, inputs: Ints, equalized: Ints) -> NDArray[np.void]:
        """The forms of one layer, `[recipes]`."""
        own, known = self.own[layer.name], self.known[layer.name]
        ways = self._choices("equalize", ("none",))
        code = equalized + 1
        for number in own:
            code = code * len(self.axes[number].choices) + picks[:, number]
        if any(self.axes[number].kind == "rank" for number in own):  # a rank depends on the shape
            code = (code * (layer.weight_shape[0] + 1) + outputs) * (layer.weight_shape[1] + 1) + inputs
        codes, first, where = np.unique(code, return_index=True, return_inverse=True)
        rows = []
        for one, row in zip(codes.tolist(), first.tolist(), strict=True):
            if one not in known:
                chosen = {self.axes[n].kind: self.axes[n].choices[picks[row, n]] for n in own}
                steps = layer_steps(layer, chosen, (int(outputs[row]), int(inputs[row])))
                way = "none" if equalized[row] < 0 else ways[equalized[row]]
                known[one] = _numbers(layer, form_of(steps), self.overhead, way)
            rows.append(known[one])
        return np.array(rows, dtype=_FORM)[where]
