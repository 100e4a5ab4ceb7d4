"""Several networks in one graph: it computes their mean, whatever they are made of, and weighs what was foretold."""

import itertools

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from paretorch.errors import ExportFailed, RecipeError
from paretorch.objectives import cost
from paretorch.objectives.measurement import Estimate, Measurement
from paretorch.objectives.objective import Budget, Objective
from paretorch.results.candidate import OK, Candidate
from paretorch.results.front import Front
from paretorch.runners.compression.fits import check_fits
from paretorch.runners.compression.library import LayerLibrary
from paretorch.runners.files import packing
from paretorch.runners.graphs.merge import merge
from paretorch.runners.graphs.simulate import Simulation
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.targets import torch_graph
from paretorch.runners.targets.runtime import session
from paretorch.search.ensembles import Network, combinations
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.cluster import Cluster
from paretorch.spaces.techniques.ensemble import Ensemble
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.sparsify import Sparsify


def together(*recipes):
    return Recipe((Ensemble(tuple(recipe.to_json() for recipe in recipes)),))


def uniform(runner, bits, activations=32, zeros=0.0, keep=1.0):
    steps = [Quantize(layer.name, bits, activations) for layer in runner.structure.layers]
    steps += [Sparsify(layer.name, zeros) for layer in runner.structure.layers if zeros]
    wanted = {g.name: int(g.channels * keep) // g.round_to * g.round_to for g in runner.structure.groups if keep < 1}
    return Recipe((*steps, *(Prune(name, kept) for name, kept in wanted.items() if kept)))


@pytest.fixture(scope="module")
def runner_of(network, task_of, tmp_path_factory):
    """`runner_of(name)` -> a runner of a network; each made once."""
    made = {}

    def get(name):
        if name not in made:
            task = task_of(*network(name))
            folder = tmp_path_factory.mktemp(name)
            made[name] = LocalRunner(
                task, folder, MeasurementSettings(calibration_images=64, seconds=0.01), library=LayerLibrary(limit=0)
            )
        return made[name]

    return get


def ran(packed, x):
    runtime = session(packing.unpack(packed))
    return runtime.run(None, {runtime.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize("name", ["residual", "mobile", "perceptron", "gated", "sound", "tokens", "branches"])
def test_the_file_gives_the_mean_of_its_networks(runner_of, name):
    """Integers of 2 to 8 bits, int8 regions, codebooks, floats and removed channels side by side, at any batch size."""
    runner = runner_of(name)
    codebook = Recipe((Cluster(runner.structure.layers[-1].name, 4),))
    found = [uniform(runner, 2), uniform(runner, 8, 8), uniform(runner, 4, 8, 0.5, 0.5), codebook, Recipe()]
    files = {recipe: runner.build(recipe) for recipe in found}
    x = runner.builder.calibration.numpy()
    for chosen in [found[:2], found[1:3], found[2:5], found[:4]]:
        packed = runner.build(together(*chosen))
        onnx.checker.check_model(packing.unpack(packed), full_check=True)
        for batch in (1, 5):
            expected = np.mean([ran(files[recipe], x[:batch]) for recipe in chosen], axis=0)
            assert np.abs(ran(packed, x[:batch]) - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


def test_it_runs_in_torch_and_in_the_simulation(runner_of):
    runner = runner_of("residual")
    packed = runner.build(together(uniform(runner, 4), uniform(runner, 8), Recipe()))
    x = runner.builder.calibration[:4]
    expected = ran(packed, x.numpy())
    assert np.abs(Simulation(packing.unpack(packed))(x).numpy() - expected).max() <= 1e-4
    other = torch_graph.load(packing.onnx_bytes(packed), 1, "cpu")(x.numpy())
    assert np.abs(other - expected).max() <= 1e-4


def test_kept_files_are_read_and_missing_ones_made(runner_of, monkeypatch):
    runner = runner_of("perceptron")
    one, two = uniform(runner, 3), uniform(runner, 5)
    fresh = runner.build(together(one, two))
    for recipe in (one, two):
        runner.path(recipe).write_bytes(runner.build(recipe))
    runner.path(two).write_bytes(b"damaged")
    phases = []
    assert runner.build(together(two, one), phases.append) == fresh
    assert phases == ["compressing", "exporting", "merging"]
    runner.path(one).unlink()
    runner.path(two).unlink()


def test_equal_tensors_are_stored_once(runner_of):
    runner = runner_of("perceptron")
    last = runner.structure.layers[-1].name
    others = tuple(Quantize(layer.name, 4) for layer in runner.structure.layers[:-1])
    one, two = Recipe((*others, Quantize(last, 3))), Recipe((*others, Quantize(last, 6)))
    whole = len(runner.build(together(one, two)))
    assert whole < 1.25 * len(runner.build(one))
    names = [t.name for t in packing.unpack(runner.build(together(one, two))).graph.initializer]
    assert len(names) == len(set(names))


def test_costs(runner_of):
    runner = runner_of("residual")
    one, two = uniform(runner, 4, keep=0.5), uniform(runner, 8)
    macs = [cost.macs(runner.structure, recipe) for recipe in (one, two, together(one, two))]
    assert macs[0] + macs[1] == macs[2]
    with pytest.raises(RecipeError, match="cannot be foretold"):
        cost.size_bytes(runner.structure, together(one, two), cost.FileOverhead())


def test_a_foreign_network_is_refused_before_anything_is_built(runner_of):
    runner = runner_of("residual")
    with pytest.raises(RecipeError, match="no layer 'nowhere'"):
        check_fits(together(Recipe((Quantize("nowhere", 4),)), Recipe()), runner.structure)


def test_other_inputs_are_refused():
    def graph(width):
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", width]) for n in ("input", "output"))
        return helper.make_model(
            helper.make_graph([helper.make_node("Relu", ["input"], ["output"])], "g", [x], [y]), ir_version=10
        )

    with pytest.raises(ExportFailed, match="has not the input of the first"):
        merge([graph(3), graph(4)])


LEVELS = st.tuples(st.sampled_from((2, 3, 4, 6, 8, 16)), st.sampled_from((8, 32)), st.sampled_from((0.0, 0.5, 0.9)))


@pytest.mark.parametrize("name", ["residual", "mobile", "perceptron", "tokens"])
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bytes_are_foretold_within_a_per_cent(name, runner_of, data):
    """Or within 250 bytes a network, where the files are so small that their graphs are a large part of them."""
    runner = runner_of(name)
    recipes = []
    for _ in range(3):
        shared, keep = data.draw(st.none() | LEVELS), data.draw(st.sampled_from((1.0, 0.5)))
        steps = []
        for layer in runner.structure.layers:
            bits, activations, zeros = shared or data.draw(LEVELS)
            steps += [Quantize(layer.name, bits, activations if bits <= 8 else 32)]
            steps += [Sparsify(layer.name, zeros)] if zeros else []
        recipes.append(Recipe((*steps, *(s for s in uniform(runner, 8, keep=keep).steps if isinstance(s, Prune)))))
    recipes = list(dict.fromkeys(recipes))
    files = {recipe: runner.build(recipe, recovery=False) for recipe in recipes}
    measured = {
        recipe: Measurement({"accuracy": Estimate.exact(0.5), "size_bytes": Estimate.exact(len(packed))})
        for recipe, packed in files.items()
    }
    candidates = tuple(Candidate(n, recipe, OK, "", measured[recipe]) for n, recipe in enumerate(recipes))
    front = Front(
        candidates, (Objective.parse("accuracy"), Objective.parse("size_bytes")), Budget(), measured[recipes[0]]
    )
    networks = [Network.of(c, files[c.recipe]) for c in candidates]
    scores = itertools.count()  # each better than the one before: pairs, and all three
    found = combinations(front, networks, lambda ensembles: [float(next(scores)) for _ in ensembles])
    assert len(found) == {1: 0, 2: 1, 3: 4}[len(networks)]
    for combination in found:
        members = [n.candidate.recipe for n in combination.networks]
        real = len(packing.pack(merge([packing.unpack(files[recipe]) for recipe in members])))
        assert abs(combination.values["size_bytes"] - real) <= max(0.01 * real, 250 * len(members)), real
