"""Costs by arithmetic against what real modules compute and real packing takes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paretorch.objectives.cost import FileContents, FileOverhead, contents, layer_bytes, level, macs, many, size_bytes
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.rules import Rule
from paretorch.spaces.shapes import shapes
from paretorch.spaces.space import Space
from paretorch.spaces.structure import Group, Layer, Structure
from paretorch.spaces.techniques.cluster import Cluster
from paretorch.spaces.techniques.lowrank import LowRank
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.sparsify import Sparsify
from paretorch.spaces.techniques.student import Student

WIDTHS = {"a": 8, "b": 12, "c": 6}


def network(a=8, b=12, c=6):
    """Three convolutions, one of them read by a depthwise one, and a linear layer over flattened maps of 4 x 4."""
    return nn.Sequential(
        nn.Conv2d(3, a, 3, padding=1, bias=False),
        nn.Conv2d(a, a, 3, padding=1, groups=a),
        nn.Conv2d(a, b, 3, stride=2, padding=1),
        nn.Conv2d(b, c, 1),
        nn.Flatten(),
        nn.Linear(c * 4 * 4, 5),
    )


def count(model, size=8):
    """Multiply-adds of each layer, counted by hooks: each output is a sum over the weights of its channel."""
    found = {}

    def hook(name):
        return lambda module, args, out: found.__setitem__(name, out[0].numel() * module.weight[0].numel())

    layers = {name: m for name, m in model.named_modules() if hasattr(m, "weight")}
    for name, module in layers.items():
        module.register_forward_hook(hook(name))
    model(torch.zeros(1, 3, size, size))
    return found, layers


def structure_of(model):
    costs, layers = count(model)
    output = {"0": "a", "1": "a", "2": "b", "3": "c"}
    inputs = {"1": (("a", 8),), "2": (("a", 8),), "3": (("b", 12),), "5": (("c", 96),)}
    kinds = {"1": "depthwise", "5": "linear"}
    made = tuple(
        Layer(
            name,
            kinds.get(name, "conv"),
            tuple(m.weight.shape),
            costs[name],
            m.bias is not None,
            output.get(name),
            inputs.get(name, ()),
        )
        for name, m in layers.items()
    )
    return Structure(made, tuple(Group(name, width, 1) for name, width in WIDTHS.items()))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(1, 12), st.integers(1, 6))
def test_a_pruned_network_costs_what_a_real_one_of_its_widths_does(a, b, c):
    structure = structure_of(network())
    kept = {"a": a, "b": b, "c": c}
    recipe = Recipe(tuple(Prune(name, keep) for name, keep in kept.items() if keep < WIDTHS[name]))
    costs, layers = count(network(**kept))
    assert macs(structure, recipe) == sum(costs.values())
    assert shapes(structure, recipe) == {name: tuple(m.weight.shape[:2]) for name, m in layers.items()}
    assert layer_bytes(structure, recipe) == sum(4 * p.numel() for m in layers.values() for p in m.parameters())


def test_a_dropped_block_costs_nothing():
    layers = tuple(Layer(name, "conv", (4, 4, 1, 1), 16) for name in ("stem", "block.1.conv", "block.10.conv"))
    structure = Structure(layers, blocks=("block.1",))
    recipe = Recipe((Student(("block.1",)),))
    assert list(shapes(structure, recipe)) == ["stem", "block.10.conv"]
    assert macs(structure, recipe) == 32
    assert layer_bytes(structure, recipe) == 2 * (4 * 16 + 4 * 4)


def test_weights_that_rounding_makes_zero_are_counted_as_measured():
    """Half of the weights at 2 bits: a bitmap and a sign for each of the others, instead of five to a byte."""
    structure = Structure((Layer("fc", "linear", (50, 40), 2000, bias=False),))
    recipe = Recipe((Quantize("fc", 2), Sparsify("fc", 0.25)))
    measured = FileOverhead(nonzero={"fc": {level(2, 0.25): 0.5}})
    assert layer_bytes(structure, recipe, measured) == 2000 // 8 + 1000 // 8 + 4 * 50
    assert layer_bytes(structure, recipe) == 2000 // 5 + 4 * 50
    assert size_bytes(structure, recipe, measured) == 2000 // 8 + 1000 // 8 + 4 * 50


@pytest.mark.parametrize(("bits", "scales"), [(1, 4 * 5), (3, 4 * 5), (8, 4 * 5), (16, 0)])
def test_scales_and_biases_are_counted(bits, scales):
    structure = Structure((Layer("fc", "linear", (5, 7), 35),))
    bare = Structure((Layer("fc", "linear", (5, 7), 35, bias=False),))
    recipe = Recipe((Quantize("fc", bits),))
    weights = -(-35 * bits // 8)
    assert layer_bytes(structure, recipe) == weights + scales + 4 * 5
    assert layer_bytes(bare, recipe) == weights + scales


def test_the_overhead_of_the_file_depends_on_how_layers_are_run():
    layers = tuple(Layer(name, "linear", (4, 4), 16, output=name) for name in "abcde")
    structure = Structure(layers, (Group("a", 4, 1), Group("b", 4, 1)), blocks=("e",))
    overhead = FileOverhead(1000, 10, 100, 7, 30, 200, -40)
    assert size_bytes(structure, Recipe(), overhead) == layer_bytes(structure, Recipe()) + 1000 + 5 * 7
    steps = (Quantize("a", 8, 8), Quantize("b", 4, 8), Quantize("c", 4), Sparsify("c", 0.5), Quantize("d", 8, 8))
    recipe = Recipe((*steps, Recover("batchnorm"), Student(("e",)), Prune("b", 2)))
    assert contents(structure, recipe) == FileContents(1, 1, 3, 4, 2, True, 0.25)
    rest = 1000 + 10 + 3 * 100 + 4 * 7 + 2 * 30 + 200 - 40 / 4
    assert size_bytes(structure, recipe, overhead) == layer_bytes(structure, recipe) + rest


def test_an_overhead_that_an_older_study_stored_still_counts():
    structure = Structure(tuple(Layer(name, "linear", (4, 4), 16) for name in "abc"))
    overhead = FileOverhead(**{"base": 1000, "per_weight_only": 10, "per_quantized": 100})
    recipe = Recipe((Quantize("a", 8, 8), Quantize("b", 4)))
    assert size_bytes(structure, recipe, overhead) == layer_bytes(structure, recipe) + 1110


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_many_recipes_at_once_cost_what_each_does(seed):
    plain = structure_of(network())
    structure = Structure(
        plain.layers,
        (*plain.groups[:2], Group("c", 6, 4)),
        ("3", "1"),
        (),
        (("2", "bn"), ("5", "bn")),
        pairs=(("2", ("5",)),),
    )
    space = Space(
        equalize=("none", "weights", "activations"),
        weight_bits=(Rule((32, 1, 2, 3, 8, 16)), Rule((4, 8), ("last",))),
        activation_bits=(Rule((8, 32), ("conv",)), Rule((32, 8), ("linear", "depthwise"), share=True)),
        cluster_bits=(Rule((32, 2, 8)), Rule((4, 32), ("linear", "3"), share=True)),
        rank=(Rule((1.0, 0.5, 0.2)),),
        sparsity=(Rule((0.0, 0.3, 0.75, 0.9, "2:4")), Rule((0.0, 0.5), ("depthwise", "first"))),
        criterion=(Rule(("obs", "magnitude"), share=True),),
        rounding=(Rule(("nearest", "gptq")),),
        activations=(Rule(("static", "dynamic"), ("linear",)),),
        group_size=(Rule((0, 16, 64), ("linear",)),),
        scheme=(Rule(("affine", "symmetric")),),
        channels=(Rule((0.0, 0.25, 0.6)),),
        width=(1.0, 0.75, 0.5),
        depth=(0, 1, 2),
        recovery=(None, Recover("batchnorm")),
    )
    axes = space.axes(structure)
    random = np.random.default_rng(seed)
    names = [layer.name for layer in structure.layers]
    shares = {
        name: {
            level(bits, ratio, affine=affine): random.random()
            for bits in (2, 3, 4, 8)
            for ratio in (0.0, 0.3, 0.9)
            for affine in (False, True)
        }
        for name in names[1:]
    }
    shares["5"] |= {level(bits, 0.3, "weights"): random.random() for bits in (2, 3)}
    overhead = FileOverhead(1234.5, 10.25, 100.125, 70.5, 30.25, 200.5, -40.125, shares, 90.25)
    picks = random.integers(0, [len(axis.choices) for axis in axes], (20, len(axes)))
    found = many(structure, axes, overhead)(picks)
    for row, size, operations in zip(picks, found["size_bytes"], found["macs"], strict=True):
        recipe = space.recipe(structure, {axis.name: int(pick) for axis, pick in zip(axes, row, strict=True)})
        assert size == size_bytes(structure, recipe, overhead)
        assert operations == macs(structure, recipe)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.integers(1, 12), st.data())
def test_a_layer_of_low_rank_costs_what_two_real_ones_do(a, b, data):
    structure = structure_of(network())
    rank = data.draw(st.integers(1, 12))
    kept = [Prune(name, keep) for name, keep in (("a", a), ("b", b)) if keep < WIDTHS[name]]
    recipe = Recipe((*kept, LowRank("2", rank)))
    model = network(a, b)
    model[2] = nn.Sequential(nn.Conv2d(a, rank, 3, 2, 1, bias=False), nn.Conv2d(rank, b, 1))
    costs, layers = count(model)
    assert macs(structure, recipe) == sum(costs.values())
    assert layer_bytes(structure, recipe) == sum(4 * p.numel() for m in layers.values() for p in m.parameters())
    # Three bits a weight in both, and a scale for each of their channels.
    rest = layer_bytes(structure, recipe) - sum(4 * p.numel() for p in model[2].parameters())
    packed_bytes = sum(-(-3 * m.weight.numel() // 8) + 4 * len(m.weight) for m in model[2])
    assert layer_bytes(structure, Recipe((*recipe.steps, Quantize("2", 3)))) == rest + packed_bytes + 4 * b


@pytest.mark.parametrize(
    ("bits", "zeros", "indices", "entries"), [(3, 0.0, 23, 8), (8, 0.0, 60, 60), (8, 0.5, 38, 31), (2, 0.5, 15, 4)]
)
def test_a_codebook_is_counted_with_its_indices_and_a_batchnorms_factors(bits, zeros, indices, entries):
    plain = Structure((Layer("fc", "linear", (5, 12), 60),))
    folded = Structure((Layer("fc", "linear", (5, 12), 60),), folds=(("fc", "bn"),))
    recipe = Recipe((Cluster("fc", bits), *([Sparsify("fc", zeros)] if zeros else [])))
    expected = indices + 4 * entries + 4 * 5
    assert layer_bytes(plain, recipe) == expected
    assert layer_bytes(folded, recipe) == expected + 4 * 5


def test_equalization_that_a_dropped_block_undoes_counts_nowhere():
    """With the block of its only pair gone nothing is equalised, whatever was picked."""
    layers = tuple(Layer(name, "linear", (8, 8), 64) for name in ("stem", "block.a", "block.b", "fc"))
    structure = Structure(layers, blocks=("block",), pairs=(("block.a", ("block.b",)),))
    space = Space(weight_bits=(Rule((2,)),), depth=(0, 1), equalize=("none", "weights"))
    measured = {layer.name: {level(2, 0.0): 0.9, level(2, 0.0, "weights"): 0.2} for layer in layers}
    overhead, axes = FileOverhead(nonzero=measured), space.axes(structure)
    picks = np.array(np.meshgrid(*(range(len(axis.choices)) for axis in axes))).reshape(len(axes), -1).T
    found = many(structure, axes, overhead)(picks)["size_bytes"]
    recipes = [space.recipe(structure, dict(zip((a.name for a in axes), row.tolist(), strict=True))) for row in picks]
    assert found.tolist() == [size_bytes(structure, recipe, overhead) for recipe in recipes]
    assert len(set(found)) == 3, "two sizes of the whole network, one without the block"
