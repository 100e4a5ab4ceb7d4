"""The shapes of the layers that a recipe leaves, and the ranks that a layer may have.

All of it is arithmetic of whole numbers that holds for arrays of them as well: `objectives.cost` uses it for many
recipes at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .steps import Steps
from .structure import Layer, Structure, inside, kept_channels
from .techniques.prune import Prune
from .techniques.student import dropped


def channels_of(layer: Layer, keep: Mapping[str, Any], channels: Mapping[str, int]) -> tuple[Any, Any]:
    """Output and input channels of a layer when `keep` of the `channels` of groups stay: numbers, or arrays of them."""
    outputs, inputs = layer.weight_shape[:2]
    if layer.output and layer.output in keep:  # a depthwise layer may make several channels from each of its group's
        outputs = outputs * keep[layer.output] // channels[layer.output]
    if layer.kind != "depthwise":
        for name, count in layer.inputs:
            if name in keep:
                inputs = inputs - (count - count * keep[name] // channels[name])
    return outputs, inputs


def shapes(structure: Structure, recipe: Steps) -> dict[str, tuple[int, int]]:
    """Output and input channels of each layer that stays."""
    structure = structure.of(recipe)
    gone = dropped(recipe)
    keep = {step.group: step.keep for step in recipe.of(Prune)}
    channels = {group.name: group.channels for group in structure.groups}
    there = (layer for layer in structure.layers if not inside(layer.name, gone))
    return {layer.name: channels_of(layer, keep, channels) for layer in there}


def sides(layer: Layer, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a layer's weight as a matrix, outputs by all that each of them reads.

    >>> sides(Layer("a", "conv", (64, 32, 3, 3), 0), (64, 16))
    (64, 144)
    """
    return shape[0], shape[1] * math.prod(layer.weight_shape[2:])


def largest_rank(rows: int, columns: int) -> int:
    """The largest rank at which two factors have fewer numbers than the matrix, and so fewer MACs; 0 for none.

    >>> largest_rank(64, 64), largest_rank(64, 576), largest_rank(1, 8)
    (31, 57, 0)
    """
    return (rows * columns - 1) // (rows + columns)


def kept_rank(rows: int, columns: int, share: float) -> int | None:
    """The rank that the share `share` of the full rank is rounded to, or None where it would save nothing.

    Ranks are rounded as channels are, because they are channels of the runtime's.

    >>> kept_rank(64, 576, 0.5), kept_rank(64, 576, 0.9), kept_rank(64, 64, 0.5)
    (32, 56, None)
    """
    full = min(rows, columns)
    rank = kept_channels(full, share, 8 if full >= 32 else 4 if full >= 16 else 1)
    return rank if rank <= largest_rank(rows, columns) else None
