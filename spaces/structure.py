"""What a space may know of a network: its layers, dependency groups and blocks, as plain data.

`runners.trace` makes a `Structure` from a live module; nothing here touches a weight. The arithmetic of MACs and
bytes (`objectives.cost`) and the spaces work on this alone, so a recipe can be judged before anything is compressed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..errors import RecipeError


@dataclass(frozen=True)
class Layer:
    """One weight-carrying layer that can be compressed.

    kind: `conv`, `depthwise`, `grouped` or `linear`. weight_shape: as in torch, output first. macs: multiply-adds for
    one sample. bias: whether the exported layer has one (its own or a folded BatchNorm's). output: the dependency group
    of its output channels, or None. inputs: `(group, n)` for each group that `n` of its input channels belong to. The
    channels of a `grouped` convolution belong to no group: they cannot be removed one by one.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    macs: int
    bias: bool = True
    output: str | None = None
    inputs: tuple[tuple[str, int], ...] = ()

    @property
    def params(self) -> int:
        return math.prod(self.weight_shape)


@dataclass(frozen=True)
class Group:
    """Channels that can only be removed together, named by the first layer that makes them."""

    name: str
    channels: int
    round_to: int


@dataclass(frozen=True)
class Structure:
    """Layers in the order of execution, groups, and the blocks that can be left out (least important first).

    refused: `(module name, reason)` for what cannot be compressed. folds: `(layer, batchnorm)` pairs that are folded
    into one layer when the network is exported.
    """

    layers: tuple[Layer, ...]
    groups: tuple[Group, ...] = ()
    blocks: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    folds: tuple[tuple[str, str], ...] = ()
    input_shape: tuple[int, ...] = field(default=())

    def layer(self, name: str) -> Layer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise RecipeError(f"this network has no layer {name!r} that can be compressed")

    def group(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise RecipeError(f"this network has no group of channels {name!r} that can be narrowed")


def inside(name: str, blocks: tuple[str, ...]) -> bool:
    """Whether a module lies in one of the blocks (`layer3.2.conv1` in `layer3.2`)."""
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


def kept_channels(channels: int, share: float, round_to: int) -> int:
    """How many of `channels` stay when the share `share` is asked for: all, or a multiple of `round_to`, never zero.

    >>> kept_channels(64, 0.5, 8), kept_channels(16, 0.1, 8), kept_channels(10, 0.5, 1)
    (32, 8, 5)
    """
    if share >= 1:
        return channels  # 36 is no multiple of 8, and a network that is not narrowed keeps all 36
    kept = round_to * max(1, round(channels * share / round_to))
    return min(channels, kept)
