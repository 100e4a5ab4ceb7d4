"""The preflight: what is possible is told before the search, from real files."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from paretorch.errors import ConfigError
from paretorch.objectives import cost
from paretorch.objectives.objective import Budget, Objective
from paretorch.runners.compression.overhead import measure_overhead
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.task import Task
from paretorch.search.preflight import preflight, smallest_recipe
from paretorch.search.support import check_metrics
from paretorch.spaces.rules import Rule
from paretorch.spaces.space import Space
from paretorch.spaces.techniques.recover import Recover

SPACE = Space(
    weight_bits=(Rule((3, 8)),),
    activation_bits=(Rule((8, 32), share=True),),
    sparsity=(Rule((0.0, 0.5)),),
    channels=(Rule((0.0, 0.5)),),
    width=(1.0, 0.5),
    recovery=(Recover("batchnorm"), Recover("finetune", epochs=1)),
)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    data = TensorDataset(torch.randn(64, 1, 6, 6), torch.arange(64) % 4)
    task = Task("random", lambda: net.eval(), train=data, validation=data)
    made = LocalRunner(
        task, tmp_path_factory.mktemp("files"), MeasurementSettings(seconds=0.002, calibration_images=16)
    )
    made.measured, made.packed = made.baseline()
    made.facts = replace(made.inspect(), exact_products=True)  # whatever this processor is
    return made


@pytest.fixture(scope="module")
def overhead(runner):
    return measure_overhead(runner.builder, len(runner.packed))


def find(runner, budget=(), space=SPACE, facts=None):
    said = []
    return preflight(runner, facts or runner.facts, space, Budget.parse(budget), runner.measured, said.append)


@pytest.mark.parametrize("metric", ["size_bytes", "macs"])
def test_the_smallest_recipe_by_brute_force(runner, overhead, metric):
    structure = runner.structure
    axes = SPACE.axes(structure)

    def predicted(recipe):
        return cost.macs(structure, recipe) if metric == "macs" else cost.size_bytes(structure, recipe, overhead)

    everything = itertools.product(*(range(len(axis.choices)) for axis in axes))
    least = min(
        predicted(SPACE.recipe(structure, dict(zip([a.name for a in axes], picks, strict=True))))
        for picks in everything
    )
    found = smallest_recipe(SPACE, structure, {"": overhead}, metric)
    assert predicted(found) == least
    assert not found.of(Recover), "the preflight does not train"


def test_predicted_bytes_are_those_of_the_file(runner, overhead):
    for picks in ({}, {"weight_bits/0": 1}, {"width": 1, "sparsity/4": 1}):
        recipe = SPACE.recipe(runner.structure, picks)
        assert cost.size_bytes(runner.structure, recipe, overhead) == pytest.approx(
            len(runner.build(recipe, recovery=False)), abs=50
        )


def test_what_it_finds(runner):
    found = find(runner, ["size_bytes <= 90%"])
    assert found.warnings == ()
    assert [layer.name for layer in found.structure.layers] == ["0", "4"]
    assert found.smallest_measured.value("size_bytes") < found.baseline.value("size_bytes")
    assert runner.path(found.smallest).stat().st_size == found.smallest_measured.value("size_bytes")
    assert {axis.name for axis in found.axes} >= {"width", "weight_bits/0", "weight_bits/4", "sparsity/4", "recovery"}


def test_an_empty_space_has_the_baseline_as_its_smallest(runner):
    found = find(runner, space=Space())
    assert found.smallest_measured == runner.measured


def test_all_limits_that_cannot_be_kept_are_named_at_once(runner):
    with pytest.raises(ConfigError) as caught:
        find(runner, ["size_bytes <= 3%", "macs <= 10", "accuracy >= -1%"])
    assert len(caught.value.problems) == 2
    for problem, text in zip(caught.value.problems, ("'size_bytes <= 3%' (= ", "'macs <= 10' (= 10) "), strict=True):
        assert problem.startswith(text)
        assert "cannot be kept: the smallest recipe of this space reaches" in problem
        assert "raise the limit to at least" in problem
    share = float(caught.value.problems[0].partition("at least ")[2].partition("%")[0])
    find(runner, [f"size_bytes <= {share + 0.1:.1f}%"])


def test_a_latency_that_looks_out_of_reach_is_a_warning(runner):
    found = find(runner, ["latency_ms <= 0.000001"])
    assert len(found.warnings) == 1
    assert "the smallest recipe takes" in found.warnings[0]


@pytest.mark.parametrize(
    ("weights", "activations", "warned"), [((3, 8), (8, 32), True), ((3, 7), (8, 32), False), ((3, 8), (32,), False)]
)
def test_a_processor_whose_sums_overflow_is_a_warning(runner, weights, activations, warned):
    space = Space(weight_bits=(Rule(weights),), activation_bits=(Rule(activations, share=True),))
    found = find(runner, space=space, facts=replace(runner.facts, exact_products=False)).warnings
    assert len(found) == warned
    assert all("leave 8 out of space.weight_bits" in warning for warning in found)


def test_unknown_metrics_are_named_at_once():
    objectives = (Objective.parse("f1"), Objective.parse("speed"))
    with pytest.raises(ConfigError) as caught:
        check_metrics(objectives, Budget.parse(["bytes <= 3", "f1 >= 0.5"]), "f1")
    assert caught.value.problems == [
        "objectives: unknown metric 'speed'; choose from f1, size_bytes, latency_ms, macs",
        "budget: 'bytes <= 3': unknown metric 'bytes'; choose from f1, size_bytes, latency_ms, macs",
    ]
