"""What a space may know of a network: its layers, dependency groups and blocks, as plain data.

`runners.compression.trace` makes a `Structure` from a live module; nothing here touches a weight. The arithmetic of
MACs and bytes (`objectives.cost`) and the spaces work on this alone, so a recipe can be judged before anything is
compressed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..errors import RecipeError
from .plain import later
from .steps import Steps


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

    @property
    def factorable(self) -> bool:
        """Whether it may become two layers of low rank: the rank of a depthwise or grouped one is small as it is."""
        return self.kind in ("conv", "linear")


@dataclass(frozen=True)
class Group:
    """Channels that can only be removed together, named by the first layer that makes them.

    round_to: what shares of them are rounded to. unit: how many go at once, the size of a head where they are an
    attention's queries, keys and values.
    """

    name: str
    channels: int
    round_to: int
    unit: int = later(1)


@dataclass(frozen=True)
class Structure:
    """Layers in the order of execution, groups, and the blocks that can be left out (least important first).

    refused: `(module name, reason)` for what cannot be compressed. folds: `(layer, batchnorm)` pairs that are folded
    into one layer when the network is exported. students: by name the structures of other networks that a recipe may
    begin with, each of which knows its own name as `student`. pairs: `(layer, readers)` whose channels `Equalize` may
    scale; unpaired: `(layer, reason)` for the others.
    """

    layers: tuple[Layer, ...]
    groups: tuple[Group, ...] = ()
    blocks: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    folds: tuple[tuple[str, str], ...] = ()
    input_shape: tuple[int, ...] = field(default=())
    students: tuple[Structure, ...] = later(())
    student: str = later("")
    pairs: tuple[tuple[str, tuple[str, ...]], ...] = later(())
    unpaired: tuple[tuple[str, str], ...] = later(())

    def of(self, recipe: Steps) -> Structure:
        """The structure of the network that a recipe begins with: this one, or that of the student that it names."""
        return self.named(recipe.factory)

    def named(self, wanted: str) -> Structure:
        """The structure of the student of this name, "" for this one; raises `RecipeError` for one that the task does
        not make.
        """
        if wanted in ("", self.student):
            return self
        for structure in self.students:
            if structure.student == wanted:
                return structure
        known = ", ".join(structure.student for structure in self.students) or "none"
        raise RecipeError(
            f"student {wanted!r}: the task makes no such network; give it as Task(students={{{wanted!r}: "
            f"function}}); it makes: {known}"
        )

    def layer(self, name: str) -> Layer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise RecipeError(f"this network has no layer {name!r} that can be compressed")

    def equalizable(self, dropped: tuple[str, ...] = ()) -> bool:
        """Whether there is a pair for `Equalize` when these blocks are left out."""
        return any(not any(inside(name, dropped) for name in (layer, *readers)) for layer, readers in self.pairs)

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
