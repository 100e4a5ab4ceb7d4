"""The bytes of packed files beside the layers' tensors, fitted to a few files that are really built."""

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
from ..operators.layers import parameter_of
from ..operators.quantize import codes
from .build import Builder
from .compress import compress
from .freeze import folded_norms
from .library import Method

_SAMPLED_CHANNELS, _SAMPLED_WEIGHTS = 32, 1 << 16  # at least this many, per layer, are rounded to predict zeros


def measure_overhead(
    builder: Builder, baseline_size: int | None = None, axes: Sequence[Axis] = (), student: str = ""
) -> cost.FileOverhead:
    """Fit the bytes beside the layers' tensors to a few files, and predict how many weights are rounded to zero.

    The files are the baseline and files of 8-bit weights with float, with 8-bit and with mixed activations, without the
    blocks that can be left out, and with half of the channels.

    Args:
        builder: The builder of the files.
        baseline_size: The bytes of the baseline, if they are known.
        axes: The axes whose levels are predicted.
        student: The name of the network whose files are built, as it is before any training; the task's when "".
    """
    begin = [Student(factory=student)] if student else []
    structure = builder.structure.named(student)

    def mixed(*modes: int, without: tuple[str, ...] = ()) -> list[Quantize]:
        """Steps for the layers outside `without`: activation bits in turn (0: none), 8 and 4 weight bits in turn."""
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
    # The least-squares solution of least norm: coefficients that cannot be told apart get equal shares.
    fitted, *_ = np.linalg.lstsq(np.array([list(row.values()) for row in made_of], float), np.array(rest), rcond=None)
    coefficients = dict(zip(made_of[0], map(float, fitted), strict=True))
    return cost.FileOverhead(**coefficients, nonzero=shares.nonzero)


def nonzero_shares(
    builder: Builder, model: nn.Module, structure: Structure, axes: Sequence[Axis]
) -> dict[str, dict[str, float]]:
    """The share of each layer's weights that are not zero after masking and rounding.

    A large layer is represented by some of its output channels: each channel has a scale of its own, or all share the
    scale of these. Nearest rounding represents the other methods of rounding, and the magnitude criterion the other
    criteria, which leave about as many nonzero weights.

    Args:
        builder: The builder, whose library compresses the layers.
        model: The network.
        structure: The structure of the network.
        axes: The axes whose levels are predicted. With cross-layer equalization among them, the weights that it scales
            are predicted as well.

    Returns:
        By layer, the share by level (`cost.level`).
    """
    models = {"none": model}
    for by in (by for axis in axes if axis.kind == "equalize" for by in axis.choices if by != "none"):
        recipe = Recipe((Equalize(by),))
        models[by] = compress(copy.deepcopy(model), recipe, structure, builder.example, None, builder.statistics)
    readers = {name for _, names in structure.pairs for name in names}
    choices = {(axis.kind, target): axis.choices for axis in axes for target in axis.targets}
    shares: dict[str, dict[str, float]] = {}
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
            weight = parameter_of(network.get_submodule(layer.name)).detach()
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
                    shares.setdefault(layer.name, {})[cost.level(bits, zeros, by, affine)] = share
    return shares
