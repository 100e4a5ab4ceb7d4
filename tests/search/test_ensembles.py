"""Ensembles in a study: what is looked through, what of it is measured, and that nothing is done twice."""

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import paretorch
from paretorch.errors import RecipeError
from paretorch.objectives.measurement import Measurement, Metric
from paretorch.objectives.objective import Budget, Objective
from paretorch.runners.apply import apply_recipe, read_recipe
from paretorch.runners.artifact import verify
from paretorch.runners.evaluate import Way
from paretorch.runners.local import LocalRunner
from paretorch.runners.record import Protocol
from paretorch.runners.task import Task
from paretorch.search.candidate import FAILED, OK, OVER_BUDGET, STOPPED, Candidate
from paretorch.search.ensembles import TRIED, Network, best, chosen, combinations, eligible
from paretorch.search.explain import explain
from paretorch.search.front import Front
from paretorch.search.study import Quiet, Study, open_front
from paretorch.spaces.recipe import Ensemble, Quantize, Recipe, Recover
from paretorch.spaces.space import Rule, Space

TRAINED = Recover("finetune", epochs=2, learning_rate=0.5, distill=0.0)
SPACE = Space(weight_bits=(Rule((2, 3)),), sparsity=(Rule((0.0, 0.5)),), recovery=(TRAINED,))


def blobs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, 4, (count,), generator=generator)
    return TensorDataset(centres[labels] + 3 * torch.randn(count, 1, 6, 6, generator=generator), labels)


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4))  # fmt: skip
        x, y = blobs(256, 1).tensors
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval()


def likelihood(outputs, targets):
    """The log-likelihood, moved to where it is positive: concave in the logits, so that averages of them gain by it."""
    return (1 + outputs.log_softmax(1).gather(1, targets[:, None])[:, 0] / 20).clamp_min(0)


def task():
    splits = {"train": blobs(128, 1), "validation": blobs(200, 2), "test": blobs(100, 3)}
    return Task("blobs", network, metric=likelihood, metric_name="likelihood", **splits)


class Told(Quiet):
    def __init__(self, after=None):
        self.said, self.found, self.after = [], [], after

    def say(self, text):
        self.said.append(text)

    def finished(self, candidate, front, done, total, eta):
        self.found.append(candidate)
        if len(self.found) == self.after:
            raise KeyboardInterrupt


def study(folder, listener=None, **more):
    more = {"seconds": 0.002, "calibration_images": 32, "mlflow": False, "rungs": False, "ensembles": True} | more
    return Study(task(), SPACE, budget=("size_bytes <= 90%",), directory=folder, listener=listener, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "study"
    told = Told()
    return study(folder, told).run(12), told, folder


def of_ensembles(candidates):
    return [c for c in candidates if c.recipe.of(Ensemble)]


def test_x(finished):
    front, told, folder = finished
    for c in front.candidates: print(c.number, c.state, c.recipe.describe(), c.measurement and (c.measurement.value("size_bytes"), c.measurement.value("likelihood")))
    print([m.number for m in front.members], told.said)
    assert 0
