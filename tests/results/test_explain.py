"""Blame finds the decision that did the harm, and the suggestion does away with some of it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from paretorch.objectives.objective import Budget
from paretorch.results.explain import decisions, explain, untrained
from paretorch.runners.compression.library import LayerLibrary
from paretorch.runners.local import LocalRunner
from paretorch.runners.task import Task
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.structure import Group, Structure
from paretorch.spaces.techniques.equalize import Equalize
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.sparsify import Sparsify
from paretorch.spaces.techniques.student import Student


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    torch.manual_seed(0)
    centres = torch.randn(6, 20)

    def data(count):
        y = torch.randint(0, 6, (count,))
        return TensorDataset(centres[y] + 2.5 * torch.randn(count, 20), y)

    train = data(512)
    net = nn.Sequential(
        nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 6)
    )
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(train.tensors[0]), train.tensors[1]).backward()
        optimizer.step()
    task = Task("blobs", lambda: net.eval(), train, data(600))
    return LocalRunner(task, tmp_path_factory.mktemp("files"), library=LayerLibrary(limit=0))


BASE = {"size_bytes": 10_000.0, "macs": 2000.0}


def told(runner, recipe, budget=(), images=600):
    return explain(runner, recipe, Budget.parse(budget), BASE, images, lambda done, total, what: None)


def test_the_layer_that_does_the_harm_is_blamed(runner):
    found = told(runner, Recipe((Quantize("0", 8, 8), Quantize("3", 2, 8), Quantize("5", 7, 8))))
    assert found.images == 600
    worst = found.costs[0]
    assert worst.what == "3: weights of 2 bits"
    assert worst.divergence > 0.8 * found.divergence > 5 * found.costs[1].divergence
    assert worst.metric.low < worst.metric.value > 0.005
    assert worst.size_bytes > 500  # 1,024 weights of 8 bits instead of 2
    assert {cost.what for cost in found.costs} == {
        "3: weights of 2 bits",
        "5: weights of 7 bits",
        "activations of 8 bits",
    }


def test_the_suggestion_is_milder_and_trains_as_before(runner):
    training = Recover("finetune", 1.0)
    steps = (Quantize("0", 8, 8), Quantize("3", 2, 8), Quantize("5", 8, 8))
    found = told(runner, Recipe((*steps, training)), ["size_bytes <= 50%"])
    assert found.suggestion.what == "3 bits in 3 instead of 2"
    assert found.suggestion.recipe == Recipe((steps[0], Quantize("3", 3, 8), steps[2], training))
    assert found.suggestion.divergence > 0
    assert found.keeps
    assert not told(runner, Recipe((*steps, training)), ["size_bytes <= 10%"]).keeps


def test_what_is_taken_back():
    structure = Structure((), (Group("a", 32, 8),), ("block1", "block2"), ())
    recipe = Recipe(
        (
            Student(("block1", "block2")),
            Prune("a", 16),
            Equalize(),
            Sparsify("b", 0.5),
            Quantize("b", 4, 8),
            Quantize("c", 16),
            Recover("batchnorm"),
        )
    )
    found = {decision.what: decision for decision in decisions(recipe, structure)}
    assert set(found) == {
        "block1: left out",
        "block2: left out",
        "a: 16 of 32 channels",
        "ranges equalised (by weights)",
        "b: 50% zeros",
        "b: weights of 4 bits",
        "c: weights of 16 bits",
        "activations of 8 bits",
    }
    assert found["block1: left out"].without.of(Student) == [Student(("block2",))]
    assert found["a: 16 of 32 channels"].milder.of(Prune) == [Prune("a", 24)]
    assert not found["ranges equalised (by weights)"].without.of(Equalize)
    assert found["b: weights of 4 bits"].without.of(Quantize)[0] == Quantize("b", 8, 8)
    assert found["c: weights of 16 bits"].without.of(Quantize) == [Quantize("b", 4, 8)]
    assert found["activations of 8 bits"].without.of(Quantize)[0] == Quantize("b", 4, 32)


def test_training_is_left_out():
    trained = Recipe((Quantize("b", 4), Recover("finetune", 2.0)))
    assert untrained(trained) == Recipe((Quantize("b", 4), Recover("batchnorm")))
    assert untrained(Recipe((Quantize("b", 4),))) == Recipe((Quantize("b", 4),))
