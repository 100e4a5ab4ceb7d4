"""What packed files weigh around the layers' tensors, fitted to a few files that are really built."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ...objectives import cost
from ...spaces.recipe import Recipe
from ...spaces.rules import Axis
from ...spaces.structure import Structure, inside, kept_channels
from ...spaces.techniques.equalize import Equalize
from ...spaces.techniques.prune import Prune
from ...spaces.techniques.quantize import Quantize
from ...spaces.techniques.sparsify import zeros_of
from ...spaces.techniques.student import Student
from ..operators.fold import channel_factors
from ..operators.quantize import codes
from .build import Builder
from .compress import compress
from .freeze import folded_norms
from .library import Method

_SAMPLED_CHANNELS, _SAMPLED_WEIGHTS = 32, 1 << 16  # at least, of a layer whose rounding is looked at beforehand


def measure_overhead(
    builder: Builder, baseline_size: int | None = None, axes: Sequence[Axis] = (), student: str = ""
) -> cost.FileOverhead:
    """The bytes around the layers' tensors, fitted to a few files, and what few bits round to zero at the axes' levels.

    The files are the baseline (of `baseline_size` bytes, where they are known) and those of 8-bit weights with float,
    with 8-bit and with mixed activations, without the blocks that can be left out, and with half of the channels.
    student: the name of the network whose files they are, as it was before any training; that of the task when "".
    """
    begin = [Student(factory=student)] if student else []
    structure = builder.structure.named(student)

    def mixed(*modes: int, without: tuple[str, ...] = ()) -> list[Quantize]:
        """Activation bits in turn for the layers that are there, 0 for none; weights of 8 and 4 bits in turn."""
        names = [layer.name for layer in structure.layers if not inside(layer.name, without)]
        steps = zip(names, itertools.cycle(modes), strict=False)
        return [Quantize(name, 4 if i // len(modes) % 2 else 8, mode) for i, (name, mode) in enumerate(steps) if mode]

    middle = structure.layers[len(structure.layers) // 2].name
    recipes = [
        Recipe(tuple(begin)),
        Recipe((*begin, *mixed(32))),
        Recipe((*begin, *mixed(8))),
        Recipe((*begin, *mixed(8, 32))),
        Recipe((*begin, Quantize(middle, 8, 8))),
    ]
    if structure.blocks:
        recipes.append(Recipe((Student(structure.blocks, student), *mixed(8, without=structure.blocks))))
    if structure.groups:
        halves = [Prune(g.name, kept_channels(g.channels, 0.5, g.round_to)) for g in structure.groups]
        narrower = [step for step in halves if step.keep < structure.group(step.group).channels]
        recipes.append(Recipe((*begin, *narrower, *mixed(8, 32, 0, 0))))
    if any(axis.kind == "activations" and "dynamic" in axis.choices for axis in axes):
        linear = [layer.name for layer in structure.layers if layer.kind == "linear"]
        recipes.append(Recipe((*begin, *(Quantize(name, 8, 8, activations="dynamic") for name in linear))))
    known = [] if baseline_size is None else [baseline_size]
    sizes = [*known, *(len(builder.build(recipe, recovery=False)) for recipe in recipes[len(known) :])]
    shares = cost.FileOverhead(nonzero=nonzero_shares(builder, builder.network(recipes[0]), structure, axes))
    rest = [size - cost.layer_bytes(structure, recipe, shares) for size, recipe in zip(sizes, recipes, strict=True)]
    made_of = [vars(cost.contents(structure, recipe)) for recipe in recipes]
    # Least squares of the least norm: where nothing tells two coefficients apart, they share.
    fitted, *_ = np.linalg.lstsq(np.array([list(row.values()) for row in made_of], float), np.array(rest), rcond=None)
    coefficients = dict(zip(made_of[0], map(float, fitted), strict=True))
    return cost.FileOverhead(**coefficients, nonzero=shares.nonzero)


def nonzero_shares(
    builder: Builder, model: nn.Module, structure: Structure, axes: Sequence[Axis]
) -> dict[str, dict[str, float]]:
    """By layer and level of the axes, the share of its weights that are not zero after masking and rounding.

    Of a large layer some output channels stand for all: each has a scale of its own, or all have the one of these.
    Nearest rounding stands for the other ways to round, and zeros of least magnitude for the other criteria, which
    leave about as many. Where ranges may be equalised, also of the weights that are then multiplied.
    """
    models = {"none": model}
    for by in (by for axis in axes if axis.kind == "equalize" for by in axis.choices if by != "none"):
        recipe = Recipe((Equalize(by),))
        models[by] = compress(copy.deepcopy(model), recipe, structure, builder.example, None, builder.statistics)
    readers = {name for _, names in structure.pairs for name in names}
    choices = {(axis.kind, target): axis.choices for axis in axes for target in axis.targets}
    found: dict[str, dict[str, float]] = {}
    for layer in structure.layers:
        levels = {(4, 0.0), (8, 0.0)}  # those of the files that the overhead is fitted to
        levels |= set(
            itertools.product(
                choices.get(("weight_bits", layer.name), ()), choices.get(("sparsity", layer.name), (0.0,))
            )
        )
        for by, network in models.items():
            if by != "none" and layer.name not in readers:
                continue
            weight = network.get_submodule(layer.name).weight.detach()  # type: ignore[operator,union-attr]
            every = max(1, len(weight) // max(_SAMPLED_CHANNELS, _SAMPLED_WEIGHTS // weight[0].numel()))
            weight, norm = weight[::every], folded_norms(network, structure).get(layer.name)
            schemes = dict.fromkeys(("symmetric", *choices.get(("scheme", layer.name), ())))
            for (bits, zeros), scheme in itertools.product(sorted(levels, key=str), schemes):
                if 1 < bits <= 8:
                    affine = scheme == "affine"
                    method = Method(pattern=zeros if isinstance(zeros, str) else "", scheme=scheme)
                    factor = channel_factors(norm)[::every] if affine and norm is not None else torch.ones(len(weight))
                    made = builder.library.compress_layer(weight, bits, zeros_of(zeros), method, factor=factor)
                    assert made.scale is not None
                    kept = weight if made.mask is None else weight * made.mask
                    step = made.scale.clamp_min(1e-12) / (factor if affine else 1)
                    whole = codes(kept, step, bits, made.zero)
                    share = float(whole.count_nonzero()) / whole.numel()
                    found.setdefault(layer.name, {})[cost.level(bits, zeros, by, affine)] = share
    return found
