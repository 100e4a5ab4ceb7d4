"""Shared weights: k-means against the exact optimum and scikit-learn, training, and what is stored and run."""

import copy

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from sklearn.cluster import KMeans
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from paretorch.runners.compression.compress import compress
from paretorch.runners.compression.freeze import freeze
from paretorch.runners.compression.trace import trace
from paretorch.runners.files import packing
from paretorch.runners.graphs.onnx_export import operators, quantized_graph
from paretorch.runners.operators.cluster import SharedWeights, kmeans, shared
from paretorch.runners.operators.fold import fold_batchnorms
from paretorch.runners.targets.runtime import session
from paretorch.runners.training.finetune import finetune
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.cluster import Cluster
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.sparsify import Sparsify


def inertia(values, centroids):
    return float(np.square(values[:, None] - centroids[None]).min(1).sum())


def optimum(values, count):
    """The least sum of squared distances, by trying every end of every interval."""
    values = np.sort(values) - values.mean()
    sums, squares = (np.concatenate([[0], np.cumsum(x)]) for x in (values, values**2))
    at = np.arange(len(values) + 1)
    cost = squares[None] - squares[:, None] - (sums[None] - sums[:, None]) ** 2 / np.maximum(at[None] - at[:, None], 1)
    cost[at[:, None] > at[None]] = np.inf
    least = cost[0]
    for _ in range(count - 1):
        least = (least[:, None] + cost).min(0)
    return float(least[-1])


DRAWN = {
    "normal": lambda r, n: r.normal(size=n),
    "heavy tails": lambda r, n: r.standard_t(2, size=n),
    "cubes": lambda r, n: r.normal(size=n) ** 3,
    "three heaps": lambda r, n: r.choice([-3.0, 0.0, 5.0], n) + r.normal(size=n) * r.choice([0.01, 0.3], n),
    "equal numbers": lambda r, n: r.integers(-20, 20, n).astype(float),
    "far from zero": lambda r, n: 1e3 + r.normal(size=n),
}


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(DRAWN)), st.integers(1, 200), st.sampled_from((1, 2, 4, 7, 16, 64)), st.integers(0, 999))
def test_few_numbers_are_clustered_exactly(kind, n, count, seed):
    values = DRAWN[kind](np.random.default_rng(seed), n)
    found = kmeans(values, count)
    assert len(found) == min(count, len(np.unique(values)))
    assert (np.diff(found) > 0).all()
    assert inertia(values, found) == pytest.approx(optimum(values, count), rel=1e-6, abs=1e-9 * float(values.var() + 1))


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "three heaps"])
@pytest.mark.parametrize("count", [4, 16])
def test_many_numbers_are_clustered_no_worse_than_by_scikit_learn(kind, count):
    values = DRAWN[kind](np.random.default_rng(0), 20_000)
    theirs = KMeans(count, n_init=3, random_state=0).fit(values[:, None]).inertia_
    assert inertia(values, kmeans(values, count)) <= 1.001 * theirs


def test_eight_bits_of_many_numbers_are_near_the_optimum():
    """Of a normal density the error of n levels goes to pi * sqrt(3) / 2 / n^2 (Panter and Dite)."""
    values = np.random.default_rng(0).normal(size=20_000)
    error = inertia(values, kmeans(values, 256)) / len(values)
    assert error < 1.02 * np.pi * np.sqrt(3) / 2 / 256**2


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 8), st.booleans(), st.integers(1, 400), st.integers(0, 99))
def test_every_weight_has_the_nearest_value(bits, zeros, n, seed):
    torch.manual_seed(seed)
    weight = torch.randn(n, 2)
    mask = (torch.rand(n, 2) > 0.6).float() if zeros else None
    indices, codebook = shared(weight, bits, mask)
    assert len(codebook) <= 2**bits
    assert int(indices.max()) < len(codebook)
    shown = codebook[indices.long()]
    kept = mask > 0 if zeros else torch.ones(n, 2, dtype=torch.bool)
    if zeros:
        assert float(codebook[0]) == 0
        assert not shown[~kept].any()
        assert int(indices[kept].min() if kept.any() else 1) >= 1, "index 0 is for what is masked"
    values = codebook[int(zeros) :]
    if kept.any():
        nearest = (weight[kept][:, None] - values).abs().min(1).values
        torch.testing.assert_close((weight - shown)[kept].abs(), nearest, rtol=0, atol=1e-6)


def test_the_gradient_of_a_value_is_the_mean_over_the_weights_that_share_it():
    torch.manual_seed(0)
    weight, upstream = torch.randn(8, 6), torch.randn(8, 6)
    mask = (torch.rand(8, 6) > 0.3).float()
    indices, codebook = shared(weight, 2, mask)
    fake = SharedWeights(indices, codebook, 2, zero=True)
    shown = fake(weight)
    assert torch.equal(shown, codebook[indices.long()])
    (shown * upstream).sum().backward()
    for number in range(1, len(codebook)):
        assert float(fake.values.grad[number - 1]) == pytest.approx(float(upstream[indices == number].mean()), rel=1e-5)
    assert len(fake.values) == len(codebook) - 1, "the zero is not trained"


def test_fine_tuning_trains_the_values_and_keeps_the_assignment(network, task_of):
    model, x = network("tokens")
    model.head.weight.data *= 8  # a trained network is sure of its answers
    recipe = Recipe((Cluster("down", 2), Sparsify("down", 0.5), Cluster("up", 2)))
    live = compress(copy.deepcopy(model), recipe, trace(model, x[:66]), x[:2])
    first = {name: live.get_submodule(name).parametrizations.weight[0] for name in ("up", "down")}
    before = {name: (fake.indices.clone(), fake.values.detach().clone()) for name, fake in first.items()}
    task = task_of(model, x)

    def loss():
        with torch.no_grad():
            found, taught = live(x).log_softmax(1), model(x).log_softmax(1)
            return float(F.kl_div(found, taught, reduction="batchmean", log_target=True))

    start = loss()
    finetune(live, model, Recover("finetune", 3, 0.02), task, 0)
    assert loss() < 0.5 * start
    for name, (indices, values) in before.items():
        assert torch.equal(first[name].indices, indices)
        assert not torch.equal(first[name].values, values)
    frozen = freeze(live, recipe)
    assert float((live.down.weight == 0).float().mean()) >= 0.5
    for name in ("up", "down"):
        weight = frozen[name]
        assert not parametrize.is_parametrized(live.get_submodule(name))
        assert torch.equal(weight.codebook[weight.codes.long()], live.get_submodule(name).weight)
        assert len(live.get_submodule(name).weight.unique()) <= 4


def exported(model, x, recipe):
    """`(the file's model, the network in torch)`."""
    structure = trace(model, x[:66])
    live = compress(copy.deepcopy(model), recipe, structure, x[:2])
    frozen = freeze(live, recipe)
    reference = copy.deepcopy(live)
    found = quantized_graph(live, x[:2], frozen, fold_batchnorms(live, structure.folds), x[:64].split(32))
    onnx.checker.check_model(found, full_check=True)
    return found, reference


def odd_batchnorms():
    """A convolution, a linear layer, each with a BatchNorm of negative, tiny and zero weights."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 16, 24),
        nn.BatchNorm1d(24),
        nn.ReLU(),
        nn.Linear(24, 10, bias=False),
    ).eval()
    for norm in (model[1], model[5]):
        nn.init.normal_(norm.weight)
        norm.weight.data[:3] = torch.tensor([0.0, -1.0, 1e-9])
        norm.running_var.uniform_(0.5, 2)
    return model, torch.randn(80, 3, 6, 6)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("zeros", [0.0, 0.6])
def test_indices_and_codebook_are_what_is_stored_and_floats_are_what_runs(bits, zeros):
    model, x = odd_batchnorms()
    names = ("0", "4", "7")
    steps = [Cluster(name, bits) for name in names] + [Sparsify(name, zeros) for name in names if zeros]
    graph, reference = exported(model, x, Recipe(tuple(steps)))
    data = packing.pack(graph)
    graph = packing.unpack(data)
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    for name in names:
        stored = tensors[f"{name}.weight_q"]
        assert stored.data_type == (
            TensorProto.INT8 if bits > 4 else TensorProto.INT4 if bits > 2 else TensorProto.INT2
        )
        values = numpy_helper.to_array(stored).astype(np.int8)
        entries = len(numpy_helper.to_array(tensors[f"{name}.weight_b"]))
        weights = model.get_submodule(name).weight.numel()
        assert entries == min(2**bits, weights if not zeros else weights - round(weights * zeros) + 1)
        assert packing.width(values) == (bits if entries == 2**bits else (entries - 1).bit_length())
        assert int((values == 0).sum()) >= round(zeros * weights)  # zeros are index 0, so that a bitmap holds the rest
        assert sum(list(tensor.dims) == list(stored.dims) for tensor in tensors.values()) == 1, (
            "the weight itself is gone"
        )
    with torch.no_grad():
        np.testing.assert_allclose(
            session(graph).run(None, {"input": x.numpy()})[0], reference(x).numpy(), rtol=1e-4, atol=1e-5
        )
    running = operators(graph)
    assert not {"Gather", "Cast", "Mul", "BatchNormalization"} & set(running)
    assert running == operators(exported(model, x, Recipe())[0]), "it runs as the untouched network does"
