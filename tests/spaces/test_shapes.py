"""The shapes of the layers that a recipe leaves."""

import numpy as np

from paretorch.objectives.cost import macs
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.shapes import channels_of, shapes
from paretorch.spaces.structure import Group, Layer, Structure
from paretorch.spaces.techniques.prune import Prune


def test_a_concatenation_loses_channels_of_both_groups():
    layers = (
        Layer("x", "conv", (8, 3, 1, 1), 24, output="x"),
        Layer("y", "conv", (4, 3, 1, 1), 12, output="y"),
        Layer("cat", "conv", (2, 15, 1, 1), 30, inputs=(("x", 8), ("y", 4))),
    )
    structure = Structure(layers, (Group("x", 8, 1), Group("y", 4, 1)))
    recipe = Recipe((Prune("x", 5), Prune("y", 1)))
    assert shapes(structure, recipe) == {"x": (5, 3), "y": (1, 3), "cat": (2, 15 - 3 - 3)}
    assert macs(structure, recipe) == 15 + 3 + 18


def test_a_depthwise_layer_may_make_several_channels_from_each():
    layers = (
        Layer("x", "conv", (8, 3, 1, 1), 24, output="x"),
        Layer("dw", "depthwise", (16, 1, 3, 3), 144, output="x", inputs=(("x", 8),)),
        Layer("fc", "linear", (10, 16), 160, inputs=(("x", 16),)),
    )
    structure = Structure(layers, (Group("x", 8, 1),))
    assert shapes(structure, Recipe((Prune("x", 4),))) == {"x": (4, 3), "dw": (8, 1), "fc": (10, 8)}


def test_many_widths_at_once_are_each_of_them():
    layer = Layer("cat", "conv", (6, 15, 1, 1), 30, output="z", inputs=(("x", 8), ("y", 4)))
    channels = {"x": 8, "y": 4, "z": 6}
    keep = {"x": np.array([8, 5, 1]), "y": np.array([4, 1, 2]), "z": np.array([6, 3, 2])}
    outputs, inputs = channels_of(layer, keep, channels)
    for row in range(3):
        one = channels_of(layer, {name: int(column[row]) for name, column in keep.items()}, channels)
        assert one == (outputs[row], inputs[row])
