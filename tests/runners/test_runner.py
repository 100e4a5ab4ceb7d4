"""The seam between a search and the work: requests and outcomes are plain data, and every runner keeps one contract."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from paretorch.errors import Diverged, ExportFailed, OverBudget, Stopped
from paretorch.objectives.measurement import Estimate, Measurement
from paretorch.objectives.objective import Budget, Objective
from paretorch.runners.local import LocalRunner
from paretorch.runners.racing import Rival
from paretorch.runners.runner import Inspect, Outcome, RunTrial, outcome_of
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.task import Task
from paretorch.runners.testing import FunctionRunner, check_runner, recording
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.structure import Layer, Structure
from paretorch.spaces.techniques.quantize import Quantize

STRUCTURE = Structure((Layer("0", "linear", (4, 8), 32), Layer("2", "linear", (4, 4), 16)))


def numbers(recipe):
    size = 100.0 - 10 * len(recipe.steps)
    return {"accuracy": Estimate.rate(9, 10), "size_bytes": Estimate.exact(size), "latency_ms": Estimate.exact(1.0)}


def local(folder):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4)).eval()

    data = TensorDataset(torch.randn(32, 8), torch.arange(32) % 4)
    task = Task("tiny", network, train=data, validation=data)
    return LocalRunner(task, folder, MeasurementSettings(seconds=0.002, calibration_images=16))


def test_the_local_runner_keeps_the_contract(tmp_path):
    check_runner(lambda: local(tmp_path))


def test_the_function_backed_runner_keeps_the_contract(tmp_path):
    check_runner(lambda: FunctionRunner(STRUCTURE, numbers))
    check_runner(lambda: FunctionRunner(STRUCTURE, numbers, tmp_path))


def test_all_broken_promises_are_named():
    calls = iter(range(1000))

    def restless(recipe):
        return numbers(recipe) | {"accuracy": Estimate.exact(float(next(calls)))}

    class Deaf(FunctionRunner):
        """It says nothing of what it does, and does not mind limits."""

        def submit(self, request, progress=None):
            if isinstance(request, RunTrial):
                request = replace(request, time_first=False)
            return super().submit(request)

    with pytest.raises(AssertionError) as caught:
        check_runner(lambda: Deaf(STRUCTURE, restless))
    message = str(caught.value)
    assert message.startswith("the runner breaks 3 of its promises:")
    assert "progress is to hear in words" in message
    assert "equal recipes gave different numbers" in message
    assert "a recipe that is too slow was not rejected before training" in message


def test_a_request_is_plain_data():
    rival = Rival("#3", np.ones(5), 0.01, (0.2,))
    request = RunTrial(
        Recipe((Quantize("0", 4),)),
        budget=Budget.parse(["size_bytes <= 50%"]),
        baseline={"size_bytes": 100.0},
        rivals=(rival,),
        cost_objectives=(Objective("size_bytes", False),),
    )
    copy = pickle.loads(pickle.dumps(request))
    assert (copy.recipe, copy.budget, copy.baseline) == (request.recipe, request.budget, request.baseline)
    assert np.array_equal(copy.rivals[0].scores, rival.scores)


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (OverBudget("too large", {"size_bytes <= 1": 2.0}), "over_budget", "refused: too large"),
        (Stopped("worse", Estimate(0.5, 0.4, 0.6, 300)), "stopped", "worse"),
        (Diverged("NaN"), "failed", "Diverged: NaN"),
        (ExportFailed("no kernel"), "failed", "ExportFailed: no kernel"),
    ],
)
def test_what_a_trial_raises_becomes_a_typed_failure(error, state, reason):
    def measure(known):
        known["size_bytes"] = Estimate.exact(7)
        raise error

    outcome = outcome_of(measure, "accuracy", {"processor": "x"})
    assert (outcome.failure.state, outcome.failure.reason) == (state, reason)
    assert pickle.loads(pickle.dumps(outcome)) == outcome
    if state == "stopped":
        assert {name: e.value for name, e in outcome.measurement.metrics.items()} == {"size_bytes": 7, "accuracy": 0.5}
        assert outcome.measurement.fidelity == "300 images"
    else:
        assert outcome.measurement is None
        assert outcome.failure.excess == ({"size_bytes <= 1": 2.0} if state == "over_budget" else {})
        assert outcome.failure.error == (type(error).__name__ if state == "failed" else "")


def test_a_mistake_in_code_is_no_outcome():
    def measure(known):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        outcome_of(measure, "accuracy", {})


def test_only_rivals_that_cost_no_more_end_an_evaluation():
    """A rival at 100% with half the bytes ends it; one that is larger, and none at all, do not."""
    good, bad = np.ones(1000), np.zeros(300)
    cost, base = (Objective("size_bytes", False),), {"size_bytes": 100.0}
    costs = {"size_bytes": Estimate.exact(60)}

    def watch(*rivals):
        return RunTrial(Recipe(), baseline=base, rivals=rivals, cost_objectives=cost).watch(costs, "accuracy")

    assert watch() is None
    with pytest.raises(Stopped, match="where #1 has"):
        watch(Rival("#1", good, losses=(0.5,)))(bad)
    watch(Rival("#2", good, losses=(0.7,)))(bad)
    with pytest.raises(Stopped, match="where the untouched network has"):
        watch(Rival("the untouched network", good, margin=0.01))(bad)


def test_requests_can_be_recorded():
    requests = []
    make = recording(lambda: FunctionRunner(STRUCTURE, numbers), requests)
    outcome = make().submit(RunTrial(Recipe((Quantize("0", 4),)))).result()
    assert isinstance(outcome, Outcome)
    assert isinstance(outcome.measurement, Measurement)
    make().submit(Inspect())
    assert [type(request) for request in requests] == [RunTrial, Inspect]
