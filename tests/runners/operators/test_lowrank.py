"""Layers of low rank against the singular value decomposition of torch, and what they really cost."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from paretorch.errors import RecipeError
from paretorch.objectives.cost import macs
from paretorch.runners.compression import library as library_module
from paretorch.runners.compression.compress import compress
from paretorch.runners.compression.library import LayerLibrary
from paretorch.runners.compression.trace import trace
from paretorch.runners.operators.fold import fold_batchnorms
from paretorch.runners.operators.lowrank import Factored, basis, factored, factors
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.shapes import kept_rank, largest_rank, sides
from paretorch.spaces.techniques.cluster import Cluster
from paretorch.spaces.techniques.lowrank import LowRank
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.sparsify import Sparsify
from paretorch.spaces.techniques.student import Student

LAYERS = {
    "linear": (lambda: nn.Linear(20, 12), (20,)),
    "tall linear without a bias over tokens": (lambda: nn.Linear(7, 30, bias=False), (5, 7)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 5, stride=2, padding=2), (6, 17)),
    "conv2d": (lambda: nn.Conv2d(5, 16, 3, padding=1, bias=False), (5, 9, 9)),
    "conv2d with all": (lambda: nn.Conv2d(5, 16, (3, 2), (2, 1), (2, 1), (2, 1), padding_mode="reflect"), (5, 9, 9)),
    "conv2d same": (lambda: nn.Conv2d(4, 8, 3, padding="same"), (4, 6, 6)),
    "pointwise": (lambda: nn.Conv2d(24, 18, 1, stride=2), (24, 6, 6)),
}


def truncated(weight, rank):
    """The weight at a rank by torch's decomposition, and all singular values."""
    u, s, vh = torch.linalg.svd(weight.detach().flatten(1).double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank], s


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 24), st.integers(1, 40), st.data())
def test_factors_are_the_truncated_decomposition(rows, columns, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    weight = torch.randn(rows, columns) * torch.logspace(0, data.draw(st.integers(-4, 0)), columns)
    first, second = factors(weight, rank)
    assert first.shape == (rank, columns)
    assert second.shape == (rows, rank)
    best, values = truncated(weight, rank)
    found = second.double() @ first.double()
    size = float(weight.norm())
    # Eckart and Young: no matrix of this rank is nearer than the norm of the singular values that are left out.
    assert float((found - weight).norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-4, abs=1e-6 * size)
    if rank == len(values) or values[rank] < 0.99 * values[rank - 1]:
        torch.testing.assert_close(found, best, rtol=0, atol=1e-5 * size)  # unique where singular values differ
    # Both factors carry the square root of the singular values: neither has numbers much larger than the other's.
    torch.testing.assert_close(first.norm(dim=1), second.norm(dim=0), rtol=1e-3, atol=1e-6 * size)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_a_weight_of_less_rank_than_asked_for(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape[0], 2) @ torch.randn(2, shape[1])
    for matrix in (weight, torch.zeros(shape)):
        first, second = factors(matrix, 5)
        torch.testing.assert_close(second @ first, matrix, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_layer_computes_what_it_does_with_the_truncated_weight(name, share):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(4, *shape)
    full = min(layer.weight.shape[0], layer.weight[0].numel())
    rank = max(1, int(full * share))
    pair = factored(layer, rank)
    reference = copy.deepcopy(layer)
    if share < 1:
        reference.weight.data = truncated(layer.weight, rank)[0].float().view_as(layer.weight)
    torch.testing.assert_close(pair(x), reference(x), rtol=1e-4, atol=1e-5)
    assert (pair[1].bias is None) == (layer.bias is None)
    assert pair[0].bias is None
    assert pair[0].weight[:, 0].numel() == rank * (layer.weight[0, 0].numel())
    assert layer.weight.shape == reference.weight.shape, "the layer itself stays as it was"


@given(st.integers(1, 300), st.integers(1, 300))
def test_the_largest_rank_is_the_last_that_saves(rows, columns):
    most = largest_rank(rows, columns)
    assert most * (rows + columns) < rows * columns <= (most + 1) * (rows + columns)


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 0.99))
def test_a_rank_that_is_kept_saves(rows, columns, share):
    rank = kept_rank(rows, columns, share)
    if rank is not None:
        assert 1 <= rank <= largest_rank(rows, columns)
        assert rank % (8 if min(rows, columns) >= 32 else 4 if min(rows, columns) >= 16 else 1) == 0
        assert abs(rank - share * min(rows, columns)) <= 8


def counted(model, x):
    """Multiply-adds for one sample, counted by hooks: each output is a sum over the weights of its channel."""
    found = []
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, args, out: found.append(out[0].numel() * m.weight[0].numel()))
    model(x[:1])
    return sum(found)


@pytest.mark.parametrize("name", ["residual", "mobile", "perceptron", "sound", "tokens"])
def test_macs_are_those_that_are_computed(name, network):
    model, x = network(name)
    structure = trace(model, x[:66])
    steps = [Prune(group.name, group.channels // 2) for group in structure.groups[:1]]
    for layer in structure.layers:
        rank = largest_rank(*sides(layer, layer.weight_shape[:2])) // 3
        steps += [LowRank(layer.name, rank)] if layer.factorable and rank else []
    recipe = Recipe(tuple(steps))
    assert len(recipe.of(LowRank)) >= 2
    live = compress(copy.deepcopy(model), recipe, structure, x[:2])
    assert counted(live, x) == macs(structure, recipe) < macs(structure, Recipe())
    assert sum(p.numel() for p in live.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_batchnorm_is_folded_into_the_second_factor(network):
    model, x = network("residual")
    structure = trace(model, x[:66])
    live = compress(copy.deepcopy(model), Recipe((LowRank("down", 8),)), structure, x[:2])
    reference = copy.deepcopy(live)
    found = fold_batchnorms(live, structure.folds)
    assert "down.1" in found
    assert "down" not in found
    assert "stem" in found
    assert len(found) == len(structure.folds)
    with torch.no_grad():
        torch.testing.assert_close(live(x), reference(x), rtol=1e-4, atol=1e-4)


def test_later_steps_are_for_both_factors(network):
    model, x = network("residual")
    structure = trace(model, x[:66])
    for step, distinct in ((Quantize("down", 3), 7), (Cluster("down", 3), 8), (None, None)):
        steps = [LowRank("down", 8), Sparsify("down", 0.5), *([step] if step else [])]
        live = compress(copy.deepcopy(model), Recipe(tuple(steps)), structure, x[:2])
        for factor in live.down:
            weight = factor.weight.detach()
            assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01 if step is None else 0.2)
            if distinct:
                rows = weight if isinstance(step, Cluster) else weight[:1]  # a codebook is one for all channels
                assert len(rows.unique()) <= distinct


def test_the_same_weight_gives_the_same_factors():
    torch.manual_seed(0)
    weight = torch.randn(48, 100)
    for one, other in zip(factors(weight, 9), factors(weight.clone(), 9), strict=True):
        assert torch.equal(one, other)
    # Up to rounding, whoever computes it: the sign of a pair of vectors is chosen, not found.
    for one, other in zip(factors(weight, 9), factors(weight * (1 + 1e-7), 9), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_all_ranks_of_a_weight_come_out_of_one_basis(network, monkeypatch):
    """The library computes it once, and the network is the same to the bit with and without it."""
    calls = []
    monkeypatch.setattr(library_module, "basis", lambda weight: calls.append(weight.shape) or basis(weight))
    model, x = network("residual")
    structure, library = trace(model, x[:66]), LayerLibrary(limit=0)
    for rank in (8, 4, 8):
        recipe = Recipe((LowRank("down", rank), LowRank("fc", rank // 2)))
        with_library = compress(copy.deepcopy(model), recipe, structure, x[:2], library)
        without = compress(copy.deepcopy(model), recipe, structure, x[:2])
        for one, other in zip(with_library.parameters(), without.parameters(), strict=True):
            assert torch.equal(one, other)
    assert len(calls) == 2


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
        self.c, self.d = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 10, 2)

    def forward(self, x):
        return self.d(self.c(F.relu(self.b(F.relu(self.a(x)))))).flatten(1)


@pytest.mark.parametrize(
    ("steps", "complaint"),
    [
        ((LowRank("fc", 8),), r"layer 'fc': rank 8 of a 10 x 32 matrix saves nothing; choose at most 7"),
        ((LowRank("nowhere", 4),), "no layer 'nowhere'"),
        ((Student(("layer1.1",)), LowRank("layer1.1.conv1", 4)), "in a block that the recipe leaves out"),
        ((Prune("down", 8), LowRank("fc", 5)), r"rank 5 of a 10 x 8 matrix saves nothing; choose at most 4"),
    ],
)
def test_what_saves_nothing_or_is_not_there_is_refused(steps, complaint, network):
    model, x = network("residual")
    with pytest.raises(RecipeError, match=complaint):
        compress(copy.deepcopy(model), Recipe(steps), trace(model, x[:66]), x[:2])


def test_grouped_convolutions_are_refused():
    torch.manual_seed(0)
    model, x = Grouped().eval(), torch.randn(8, 3, 8, 8)
    for name, kind in (("b", "grouped"), ("c", "depthwise")):
        with pytest.raises(RecipeError, match=f"layer '{name}' is a {kind} convolution"):
            compress(copy.deepcopy(model), Recipe((LowRank(name, 1),)), trace(model, x), x[:2])


class Nosy(nn.Module):
    """Looks at its layer's weight itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 10)

    def forward(self, x):
        return self.b(self.a(x.to(self.a.weight.dtype)))


def test_a_network_that_reads_a_layers_weight_is_refused():
    torch.manual_seed(0)
    model, x = Nosy().eval(), torch.randn(8, 12)
    structure = trace(model, x)
    with pytest.raises(RecipeError, match="does not run with layers of low rank in the place of a: AttributeError"):
        compress(copy.deepcopy(model), Recipe((LowRank("a", 2),)), structure, x[:2])
    assert isinstance(compress(copy.deepcopy(model), Recipe((LowRank("b", 2),)), structure, x[:2]).b, Factored)
