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
from paretorch.objectives.measurement import Estimate, Measurement
from paretorch.objectives.objective import Budget, Objective
from paretorch.results.candidate import FAILED, OK, OVER_BUDGET, STOPPED, Candidate
from paretorch.results.explain import explain
from paretorch.results.front import Front, open_front
from paretorch.runners.apply import apply_recipe, read_recipe
from paretorch.runners.artifact import verify
from paretorch.runners.local import LocalRunner
from paretorch.runners.runner import PredictValidation, RunTrial, ScoreAverages
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.task import Task
from paretorch.runners.testing import recording
from paretorch.search.ensembles import TRIED, Network, best, chosen, combinations, eligible
from paretorch.search.listener import Quiet
from paretorch.search.study import Study
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.rules import Rule
from paretorch.spaces.space import Space
from paretorch.spaces.techniques.ensemble import Ensemble
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover

TRAINED = Recover("finetune", epochs=2, learning_rate=0.1, distill=0.0)
SPACE = Space(weight_bits=(Rule((2, 3)),), sparsity=(Rule((0.0, 0.5)),), recovery=(TRAINED,))


def blobs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, 4, (count,), generator=generator)
    return TensorDataset(centres[labels] + 3 * torch.randn(count, 1, 6, 6, generator=generator), labels)


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)
        )
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


def test_ensembles_become_candidates_like_any_other(finished):
    front, told, folder = finished
    found = of_ensembles(front.candidates)
    assert 0 < len(found) <= TRIED
    assert front.candidates[12:] == tuple(c for c in found)
    assert [c.number for c in told.found] == list(range(len(front.candidates)))
    assert all(c.picks is None and c.state == OK for c in found)
    members = [c for c in found if c in front.members]
    assert members
    assert all("likelihood" in c.test and "parity_agreement" in c.test for c in members)
    assert f"{len(found)} measured, {len(members)} on the front" in told.said[-1]
    assert open_front(folder) == front
    assert (folder / "report" / "front.html").exists()
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert sum("candidate" in line for line in lines) == len(front.candidates)


def test_what_was_measured_is_what_was_foretold(finished):
    front, _, folder = finished
    runner = LocalRunner(task(), folder / "candidates", MeasurementSettings(calibration_images=32))
    targets = runner.targets()
    for candidate in of_ensembles(front.candidates):
        files = [runner.path(network).read_bytes() for network in candidate.recipe.networks()]
        mean = torch.stack([runner.outputs(data) for data in files]).mean(0)
        assert (
            runner.outputs(runner.path(candidate.recipe).read_bytes()) - mean
        ).abs().max() <= 1e-5 * mean.abs().max()
        expected = float(likelihood(mean, targets).mean())
        assert candidate.measurement.value("likelihood") == pytest.approx(expected, abs=1e-5)
        assert len(runner.path(candidate.recipe).read_bytes()) == candidate.measurement.value("size_bytes")


def test_a_finished_study_looks_through_nothing_again(finished):
    front, _, folder = finished
    told, requests = Told(), []
    assert study(folder, told, make_runner=recording(LocalRunner, requests)).run(12) == front
    assert not told.found
    assert not [r for r in requests if isinstance(r, RunTrial | PredictValidation | ScoreAverages)]


def test_a_resumed_study_repeats_no_ensemble_and_more_trials_bring_new_ones(finished, tmp_path):
    front, _, _ = finished
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "study", Told(after=13)).run(12)
    requests = []
    again = study(tmp_path / "study", make_runner=recording(LocalRunner, requests)).run(12)
    assert [c.recipe for c in again.candidates] == [c.recipe for c in front.candidates]
    ran = [r.recipe for r in requests if isinstance(r, RunTrial)]
    assert ran == [c.recipe for c in front.candidates[13:]]
    more = study(tmp_path / "study").run(13)
    assert len(more.candidates) - len(of_ensembles(more.candidates)) == 13
    keys = [c.recipe.key for c in more.candidates]
    assert len(set(keys)) == len(keys)


def test_an_ensemble_ships(finished, tmp_path):
    front, _, folder = finished
    member = of_ensembles(front.members)[0]
    runner = LocalRunner(task(), folder / "candidates", MeasurementSettings(calibration_images=32))
    path = front.export(str(member.number), tmp_path / "deploy")
    x = torch.cat([x for x, _ in runner.validation()])
    files = [runner.path(network).read_bytes() for network in member.recipe.networks()]
    mean = torch.stack([runner.outputs(data) for data in files]).mean(0)
    assert np.abs(paretorch.load(path)(x).numpy() - mean.numpy()).max() <= 1e-5 * float(mean.abs().max())
    recipe, _ = read_recipe(path)
    assert recipe == member.recipe
    fresh = LocalRunner(task(), tmp_path / "applied", MeasurementSettings(seconds=0.002, calibration_images=32))
    fresh.files.directory.mkdir()
    protocol = MeasurementSettings(threads=1, batch=1, seconds=0.002, calibration_images=32, seed=0)
    apply_recipe(fresh, recipe, protocol, tmp_path / "again", "again", lambda phase: None)
    assert verify(tmp_path / "again")["weights.safetensors"] == verify(path)["weights.safetensors"]
    with pytest.raises(RecipeError, match="an ensemble has no decisions of its own; explain one of its networks"):
        explain(runner, recipe, front.budget, {}, 16, lambda done, total, what: None)


# --- what is looked through -------------------------------------------------------------------------------------------


def candidate(number, accuracy, size, state=OK, recipe=None, macs=100.0):
    metrics = {"accuracy": accuracy, "size_bytes": size, "macs": macs}
    measured = Measurement({name: Estimate.exact(value) for name, value in metrics.items()})
    return Candidate(number, recipe or Recipe((Quantize(f"layer{number}", 4),)), state, "", measured)


def front_of(*candidates, budget=()):
    objectives = (Objective.parse("accuracy"), Objective.parse("size_bytes"))
    base = Measurement(
        {"accuracy": Estimate.exact(0.9), "size_bytes": Estimate.exact(1000), "macs": Estimate.exact(100)}
    )
    return Front(tuple(candidates), objectives, Budget.parse(budget), base)


def networks_of(front, rest=0, shared=0):
    """Networks whose files are the given number of bytes, of which the first ones are the same in all."""
    numbers = itertools.count()
    return [
        Network(
            c, {b"same": shared, bytes([next(numbers)]): int(c.measurement.value("size_bytes")) - shared - rest}, rest
        )
        for c in eligible(front)
    ]


def test_two_layers_of_what_was_measured_to_its_end_are_eligible():
    pair = Recipe((Ensemble((Recipe().to_json(), Recipe((Quantize("a", 4),)).to_json())),))
    front = front_of(
        candidate(0, 0.9, 500),
        candidate(1, 0.8, 300, OVER_BUDGET),
        candidate(2, 0.85, 500),
        candidate(3, 0.7, 500),
        candidate(4, 0.99, 10, STOPPED),
        candidate(5, 0.99, 10, recipe=pair),
        Candidate(6, Recipe((Quantize("b", 4),)), FAILED),
        Candidate(7, Recipe((Quantize("c", 4),)), OVER_BUDGET),
    )
    assert [c.number for c in eligible(front)] == [0, 2, 1]


def test_costs_add_up_and_what_is_too_dear_is_not_looked_at():
    front = front_of(
        candidate(0, 0.9, 500), candidate(1, 0.8, 300), candidate(2, 0.7, 200), budget=["size_bytes <= 60%"]
    )
    networks = networks_of(front, rest=100, shared=50)
    assert [n.candidate.number for n in chosen(front, networks)] == [0, 1, 2]
    found = combinations(front, networks, always(0.5))
    sizes = {tuple(n.candidate.number for n in c.networks): c.values["size_bytes"] for c in found}
    # 50 are shared, and a second graph takes 40 of its 100 bytes.
    assert sizes == {(0, 2): 500 + 200 - 50 - 60, (1, 2): 300 + 200 - 50 - 60}
    tight = front_of(*front.candidates, budget=["size_bytes <= 400"])
    assert [n.candidate.number for n in chosen(tight, networks)] == [1, 2]


def always(metric):
    """Every ensemble scores the same."""
    return lambda ensembles: [metric] * len(ensembles)


def test_a_third_network_joins_pairs_that_are_better_than_both():
    front = front_of(*(candidate(n, 0.5, 100) for n in range(3)))
    networks = networks_of(front)
    asked = []

    def score(ensembles):
        asked.append(list(ensembles))
        return [{(0, 1): 0.6, (0, 1, 2): 0.7}.get(places, 0.4) for places in ensembles]

    found = combinations(front, networks, score)
    assert [len(c.networks) for c in found] == [2, 2, 2, 3]
    assert asked == [[(0, 1), (0, 2), (1, 2)], [(0, 1, 2)]]
    assert len(combinations(front, networks, always(0.5))) == 3, "as good as one alone is not better"


def test_the_greatest_gain_comes_first_and_what_is_known_or_beaten_never():
    front = front_of(
        candidate(0, 0.8, 300), candidate(1, 0.7, 200), candidate(2, 0.6, 150), budget=["accuracy >= -10%"]
    )
    networks = networks_of(front)
    gains = {(0, 1): 0.85, (0, 2): 0.89, (1, 2): 0.805}
    found = combinations(front, networks, lambda ensembles: [gains.get(places, 0.0) for places in ensembles])
    one = best(front, found, ())
    assert {n.candidate.number for n in one.networks} == {0, 2}
    two = best(front, found, {one.recipe.key})
    assert {n.candidate.number for n in two.networks} == {0, 1}
    third = best(front, found, {one.recipe.key, two.recipe.key})
    assert {n.candidate.number for n in third.networks} == {1, 2}
    assert best(front, found, {c.recipe.key for c in found}) is None
    better = front_of(*front.candidates, candidate(3, 0.95, 100), budget=["accuracy >= -10%"])
    assert best(better, found, ()) is None
    strict = front_of(*front.candidates, budget=["accuracy >= 0.95"])
    assert best(strict, found, ()) is None


def test_an_empty_front_takes_the_first_that_keeps_the_limits():
    front = front_of(
        candidate(0, 0.7, 300, OVER_BUDGET), candidate(1, 0.7, 200, OVER_BUDGET), budget=["accuracy >= 0.8"]
    )
    found = combinations(front, networks_of(front), always(0.85))
    assert best(front, found, ()) is not None
