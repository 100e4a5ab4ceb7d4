"""What ships is what each parametrization says of itself."""

import torch
from torch import nn
from torch.nn.utils import parametrize

from paretorch import Quantize, Recipe, Sparsify
from paretorch.runners.compression.compress import compress
from paretorch.runners.compression.freeze import freeze
from paretorch.runners.compression.trace import trace
from paretorch.runners.operators.frozen import Freezable, FrozenWeight


class Halves(nn.Module):
    """Weights as multiples of a half, which nothing in the package knows of."""

    def forward(self, weight):
        return (2 * weight).round() / 2

    def frozen(self, weight, step):
        whole = (2 * weight).round()
        return whole / 2, FrozenWeight(8, codes=whole, scale=torch.full((len(weight),), 0.5))


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def test_a_parametrization_of_another_kind_is_frozen_as_it_says():
    model = linear()
    parametrize.register_parametrization(model[0], "weight", Halves(), unsafe=True)
    shown = model[0].weight.detach().clone()
    frozen = freeze(model, Recipe())
    assert list(frozen) == ["0"]
    assert torch.equal(model[0].weight, shown)
    assert torch.equal(frozen["0"].codes / 2, shown)
    assert not parametrize.is_parametrized(model[0])


def test_one_after_another_each_is_given_what_the_one_before_leaves():
    """Zeros stay zeros in the numbers of the second, and the network computes what it did."""
    model, x = linear(), torch.randn(2, 16)
    recipe = Recipe((Sparsify("0", 0.5),))
    compress(model, recipe, trace(linear(), x), x)
    parametrize.register_parametrization(model[0], "weight", Halves(), unsafe=True)
    outputs = model(x)
    frozen = freeze(model, recipe)
    assert torch.equal(model(x), outputs)
    assert int((frozen["0"].codes == 0).sum()) >= 64


def test_the_parametrizations_of_the_package_know_what_ships():
    model, x = linear(), torch.randn(2, 16)
    compress(model, Recipe((Quantize("0", 16), Quantize("2", 4, 8))), trace(linear(), x), x)
    assert all(isinstance(layer.parametrizations["weight"][0], Freezable) for layer in (model[0], model[2]))
    outputs = model(x)
    frozen = freeze(model, Recipe((Quantize("0", 16), Quantize("2", 4, 8))))
    assert torch.equal(model(x), outputs)
    assert frozen["0"] == FrozenWeight(16)
    assert (frozen["2"].weight_bits, frozen["2"].activation_bits) == (4, 8)
