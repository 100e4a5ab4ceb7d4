"""The study: which recipes come, what is remembered, what ends it; on a network of two layers.

Most tests use a runner whose numbers are made up from the recipe, so that a trial takes a millisecond; what stands
around it (tracing, the preflight, files, the journal) is the real thing.
"""

import json
import multiprocessing
import os
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import paretorch.runners.training.finetune as recover_module
from paretorch.errors import ConfigError, Diverged, ExportFailed, StudyError, TaskError
from paretorch.objectives import cost
from paretorch.objectives.measurement import Estimate
from paretorch.results.front import open_front
from paretorch.runners.compression.trace import trace
from paretorch.runners.runner import RunTrial
from paretorch.runners.task import Task
from paretorch.runners.testing import FunctionRunner
from paretorch.search.listener import Quiet
from paretorch.search.sampler import SAMPLERS
from paretorch.search.study import Study
from paretorch.search.trials import Trials
from paretorch.spaces.defaults import reference_recipes
from paretorch.spaces.rules import Rule
from paretorch.spaces.space import Space
from paretorch.spaces.techniques.equalize import Equalize
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover

SPACE = Space(
    weight_bits=(Rule((3, 4, 6, 8)),),
    activation_bits=(Rule((8, 32), share=True),),
    sparsity=(Rule((0.0, 0.5)),),
    channels=(Rule((0.0, 0.25, 0.5)),),
    width=(1.0, 0.75, 0.5),
    recovery=(Recover("batchnorm"), Recover("finetune", epochs=0.25)),
)
TINY = Space(weight_bits=(Rule((4, 8), share=True),))
BUDGET = ("size_bytes <= 60%", "accuracy >= -10%")


def blobs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, 4, (count,), generator=generator)
    return TensorDataset(centres[labels] + torch.randn(count, 1, 6, 6, generator=generator), labels)


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
        )
        x, y = blobs(128, 1).tensors
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        for _ in range(15):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval()


def blob_task(**more):
    return Task("blobs", network, train=blobs(128, 1), validation=blobs(100, 2), test=blobs(100, 3), **more)


class Fake:
    """Makes the runners of studies whose numbers are made up.

    requests: what all of them were asked for. fails: gives the error of a recipe, or None. refuses: the error of every
    finalist's file, or None. finalists: whose files were measured as finalists. facts: what a runner says of its task,
    or None.
    """

    def __init__(self):
        self.requests, self.fails, self.refuses, self.finalists, self.facts = [], None, None, [], None
        self.seconds_per_epoch = 1.0

    @property
    def ran(self):
        return [request.recipe for request in self.requests if isinstance(request, RunTrial)]

    def make(self, task, directory, settings, *, target):
        splits = ("train", "validation", "test")
        samples = {split: len(getattr(task, split)) for split in splits if getattr(task, split) is not None}
        return FunctionRunner(
            structure(),
            self.measure,
            directory,
            samples=samples,
            overhead=OVERHEAD,
            seconds_per_epoch=self.seconds_per_epoch,
            finalist=self.finalist,
            requests=self.requests,
            facts=self.facts,
        )

    def measure(self, recipe):
        if self.fails and (error := self.fails(recipe)):
            raise error
        size = cost.size_bytes(structure(), recipe, OVERHEAD)
        noise = int(recipe.key[:4], 16) / 0xFFFF
        return {
            "size_bytes": Estimate.exact(size),
            "onnx_bytes": Estimate.exact(size),
            "latency_ms": Estimate.exact(0.01 + size / 1e6),
            "accuracy": Estimate.rate(round(100 - 1e5 / size * 0.1 - 8 * noise), 100),
        }

    def finalist(self, path):
        self.finalists.append(path.stem)
        if self.refuses:
            raise self.refuses
        return np.repeat([1.0, 0.0], [90, 10]), Estimate(0.5, 0.4, 0.6, 20)

    def study(self, directory, listener=None, **more):
        return study(directory, listener, make_runner=self.make, **more)


OVERHEAD = cost.FileOverhead(600, 30, 60)


@cache
def structure():
    """That of the network, traced once."""
    return trace(network(), blobs(8, 1).tensors[0])


@pytest.fixture
def fake():
    return Fake()


class Stop(Quiet):
    """Ctrl-C after some trials; keeps what was said."""

    def __init__(self, after=None):
        self.after, self.said, self.checks = after, [], 0

    def say(self, text):
        self.said.append(text)

    def checked(self, preflight):
        self.checks += 1

    def finished(self, candidate, front, done, total, eta):
        assert front.candidates[-1] == candidate
        if done == self.after:
            raise KeyboardInterrupt


def study(directory, listener=None, *, space=SPACE, budget=BUDGET, task=None, **more):
    more = {"seconds": 0.002, "calibration_images": 32, "mlflow": False, "rungs": False} | more
    return Study(task or blob_task(), space, budget=budget, directory=directory, listener=listener, **more)


def recipes(study):
    return [c.recipe for c in study.candidates]


def records(folder):
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


# --- real runs --------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_recipes_and_the_same_files(tmp_path):
    first, second = (study(tmp_path / str(i)) for i in range(2))
    front = first.run(10)
    assert [c.number for c in first.candidates] == list(range(10))
    second.run(10)
    assert recipes(first) == recipes(second)
    files, others = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "candidates").iterdir()} for name in "01"
    )
    assert files == others
    files = {name: data for name, data in files.items() if not name.endswith(".npy")}
    labelled = [c for c in first.candidates if c.label]
    kept = {c.recipe.key for c in (*front.members, *front.least_violating(3), *labelled)}
    assert {name.removesuffix(".safetensors") for name in files} == kept
    assert open_front(tmp_path / "0") == front
    assert all(c.test["accuracy"].n == 100 for c in front.members)
    assert front.test_baseline.n == 100
    assert {path.name for path in (tmp_path / "0" / "finalists").iterdir()} == {
        "baseline.npy",
        *(f"{c.recipe.key}.npy" for c in front.members),
    }
    for member in front.members:
        assert member.test["accuracy_difference"].value == pytest.approx(
            member.test["accuracy"].value - front.test_baseline.value
        )
        assert member.test["size_bytes"] == member.measurement.metrics["size_bytes"]
        assert member.test["parity_agreement"].value >= 0.995
        assert front.verdicts(member) == {
            "speed": front.speed(member),
            "cluster": front.clusters[member.number],
            "parity": "passed",
        }
    size = {c.recipe.key: c.measurement.value("size_bytes") for c in first.candidates if c.measurement}
    assert all(len(data) == size[name.partition(".")[0]] for name, data in files.items())


def test_the_test_split_is_looked_at_once_at_the_end(tmp_path):
    seen = []

    class Watched(Dataset):
        def __init__(self, data):
            self.data = data

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            seen.append(index)
            return self.data[index]

    task = Task("blobs", network, train=blobs(128, 1), validation=blobs(60, 2), test=Watched(blobs(50, 3)))
    study(tmp_path / "check", task=task).check()
    assert not seen
    assert not (tmp_path / "check").exists()

    class Follow(Quiet):
        def finished(self, *_):
            assert not seen

    front = study(tmp_path / "s", Follow(), task=task).run(9)
    once = 50 * (1 + 2 * len(front.members))  # a member meets it in the clean process, and beside its simulation
    assert len(seen) == once
    study(tmp_path / "s", task=task).run(9)
    assert len(seen) == once, "finalists are measured once and stored"


def test_a_metric_that_is_nan_for_some_recipe_is_a_result(tmp_path):
    class Follow(Stop):
        now = ""

        def phase(self, text):
            self.now = text

    listener = Follow()

    def metric(outputs, targets):
        scores = (outputs.argmax(1) == targets).float()
        return scores * float("nan") if listener.now == "trial 1: evaluating" else scores

    found = study(tmp_path, listener, task=blob_task(metric=metric, batch_size=256))
    found.run(10)
    states = [c.state for c in found.candidates]
    assert states.count("failed") == 1
    failed = found.candidates[states.index("failed")]
    assert failed.reason == "Diverged: metric 'accuracy' returned nan"
    assert failed.measurement is None
    assert len(found.candidates) == 10


def test_a_metric_that_is_nan_for_the_untouched_network_is_a_mistake(tmp_path):
    task = blob_task(metric=lambda outputs, targets: torch.full((len(outputs),), float("nan")))
    with pytest.raises(
        TaskError,
        match=r"task 'blobs': the untouched network cannot be measured: metric 'accuracy' returned nan\. "
        "Every candidate is compared with it, so check the metric",
    ):
        study(tmp_path / "s", task=task).run(9)
    assert not (tmp_path / "s").exists()


# --- which recipes come -----------------------------------------------------------------------------------------------


def test_anchors_come_first_and_nothing_runs_twice(tmp_path, fake):
    found = fake.study(tmp_path, budget=())
    found.run(40)
    expected = reference_recipes(SPACE, found.facts.structure)
    assert [(c.label, c.recipe) for c in found.candidates[: len(expected)]] == expected
    assert not any(c.label for c in found.candidates[len(expected) :])
    ran = fake.ran[1:]  # after the preflight's
    assert len(ran) == len(set(ran)) == 40
    assert ran == recipes(found)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_interrupted_study_goes_on_as_if_it_had_not_been(tmp_path, fake, sampler):
    # NSGA's second generation begins after 20; a space this small makes the samplers repeat themselves.
    trials, stops = (16, (9, 12)) if sampler == "gp" else (48, (3, 25, 33))
    space = Space(
        weight_bits=(Rule((3, 4, 6, 8)),), sparsity=(Rule((0.0, 0.3, 0.5)),), recovery=(Recover("batchnorm"),)
    )
    settings = {"sampler": sampler, "space": space, "seed": 3}
    fake.fails = lambda recipe: Diverged("made up") if int(recipe.key[:4], 16) % 7 == 0 else None
    whole = fake.study(tmp_path / "whole", **settings)
    whole.run(trials)
    assert {c.state for c in whole.candidates} == {"ok", "over_budget", "failed"}
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            fake.study(tmp_path / "part", Stop(stop), **settings).run(trials)
    part = fake.study(tmp_path / "part", **settings)
    part.run(trials)
    assert recipes(part) == recipes(whole)
    assert len(recipes(part)) == trials
    before, after = (
        [{k: v for k, v in r.items() if k != "candidate"} for r in records(tmp_path / n)] for n in ("whole", "part")
    )
    assert before == after, "repeated suggestions are remembered alike"


def test_another_seed_gives_other_recipes(tmp_path, fake):
    first, second = (fake.study(tmp_path / str(seed), seed=seed) for seed in range(2))
    first.run(12)
    second.run(12)
    assert recipes(first)[:8] == recipes(second)[:8]
    assert recipes(first)[8:] != recipes(second)[8:]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_space_that_is_searched_through_ends_the_search(tmp_path, fake, sampler):
    listener = Stop()
    repeats = 30 if sampler != "gp" else 4
    found = fake.study(tmp_path, listener, space=TINY, sampler=sampler, budget=(), max_repeats=repeats)
    front = found.run(60)
    ran = fake.ran[1:]  # after the preflight's
    assert len(ran) == len(set(ran)) == len(found.candidates) < 14
    assert {"4", "8"} <= {
        str(s.weight_bits) for c in front.candidates for s in c.recipe.steps if hasattr(s, "weight_bits")
    }
    assert "known recipes in a row: the space counts as searched through after" in listener.said[-1]


def test_a_space_without_any_decision(tmp_path, fake):
    found = fake.study(tmp_path, space=Space(weight_bits=(Rule((5,)),)), budget=(), max_repeats=5)
    found.run(60)
    assert [c.label for c in found.candidates][-1] == ""
    assert fake.ran[1:] == recipes(found)
    assert len(recipes(found)) == len(set(recipes(found)))


# --- what the sampler is told -----------------------------------------------------------------------------------------


def test_our_sampler_counts_from_the_limits_and_knows_the_costs(tmp_path, fake):
    found = fake.study(tmp_path, budget=("size_bytes <= 40%", "accuracy >= -10%"))
    front = found.run(40)
    base = {name: found.judge.baseline.value(name) for name in ("accuracy", "size_bytes")}
    outermost = {"accuracy": base["accuracy"] - 0.1, "size_bytes": 0.4 * base["size_bytes"]}
    assert found.suggester.ours is not None
    assert found.suggester.ours.reference == pytest.approx([outermost[o.metric] for o in found.asked.objectives])
    bits = {kind for name, kind in found.suggester.ours.kinds.items() if name.startswith("weight_bits/")}
    others = {kind for name, kind in found.suggester.ours.kinds.items() if not name.startswith("weight_bits/")}
    assert len(bits) == 1, "the layers are expected to be alike"
    assert others
    assert not others & bits
    refused = [c for c in front.candidates if c.state == "over_budget" and c.measurement is None]
    assert len(refused) <= 4, "only the recipes that it begins with may be too large"


def test_what_arithmetic_refuses_is_told_and_never_run(tmp_path, fake):
    budget = ("size_bytes <= 28%", "accuracy >= -10%", "latency_ms <= 0.0108")
    fake.fails = lambda recipe: ExportFailed("made up") if int(recipe.key[:4], 16) % 4 == 0 else None
    found = fake.study(tmp_path, budget=budget, sampler="tpe")  # ours does not ask for them
    found.run(40)
    refused = [c for c in found.candidates if c.state == "over_budget" and c.measurement is None]
    assert len(refused) > 3
    assert not {c.recipe for c in refused} & set(fake.ran)
    base = found.judge.baseline.value("size_bytes")
    for c in refused:
        predicted = cost.size_bytes(found.facts.structure, c.recipe, found.judge.overheads[""])
        assert c.excess == {"size_bytes <= 28%": pytest.approx(predicted / base / 0.28 - 1)}
        assert c.excess["size_bytes <= 28%"] > 0.01
        assert c.reason.startswith("refused: size_bytes ")
        assert "against a limit of" in c.reason
    failed = [c for c in found.candidates if c.state == "failed"]
    assert failed
    assert {c.reason for c in failed} == {"ExportFailed: made up"}

    told = found.trials.optuna.trials
    complete = [t for t in told if t.state.name == "COMPLETE"]
    assert [t for t in told if t.state.name == "FAIL"]
    assert {t.state.name for t in told} == {"COMPLETE", "FAIL"}
    for trial in complete:
        assert set(trial.constraints) == set(budget)
        assert all(
            isinstance(v, float) and v == v and abs(v) < 1e9 for v in (*trial.values, *trial.constraints.values())
        )
    by_recipe = {c.recipe: c for c in found.candidates}
    for trial in complete:
        c = by_recipe[SPACE.recipe(found.facts.structure, trial.params)]
        assert trial.constraints == {b: c.excess.get(b, 0.0) for b in budget}
        assert (max(trial.constraints.values()) > 0) == (c.state == "over_budget")


def test_a_recipe_that_is_too_slow_is_not_trained(tmp_path, fake):
    """The gate before training: its number decides, and the recipe counts as rejected."""
    measured = fake.measure
    fake.measure = lambda recipe: {
        **measured(recipe),
        **(
            {"latency_ms": Estimate.exact(5.0)}
            if recipe.of(Recover)[-1:] != [Recover("batchnorm")] and recipe.steps
            else {}
        ),
    }
    found = fake.study(tmp_path, budget=("latency_ms <= 4",))
    found.run(25)
    asked = [r for r in fake.requests if isinstance(r, RunTrial)][1:]  # after the preflight's
    assert [r.time_first for r in asked] == [True] * 25
    slow = [c for c in found.candidates if c.excess.get("latency_ms <= 4", 0) > 0 and not c.label]
    assert slow
    assert all(c.reason == "refused: latency_ms 5 ms against a limit of 4 ms (latency_ms <= 4)" for c in slow)
    assert all(c.measurement is None for c in slow)
    labelled = [c for c in found.candidates if c.label]
    assert all(c.measurement for c in labelled), "the reference recipes are measured whatever they cost"


# --- what ends it, and how it goes on ---------------------------------------------------------------------------------


def test_a_mistake_in_code_stops_the_study_which_can_be_resumed(tmp_path, fake):
    fake.fails = lambda recipe: ZeroDivisionError("a bug") if len(fake.ran) == 12 else None
    with pytest.raises(ZeroDivisionError):
        fake.study(tmp_path).run(20)
    assert len(open_front(tmp_path).candidates) == 10, "without the preflight's and the one with the bug"
    fake.fails = None
    found = fake.study(tmp_path)
    found.run(20)
    assert len(found.candidates) == 20
    whole = fake.study(tmp_path / "whole")
    whole.run(20)
    assert recipes(whole) == recipes(found)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"sampler": "random"}, 'sampler: "ehvi" then, "random" now'),
        (
            {"budget": ("size_bytes <= 50%",)},
            'budget: ["size_bytes <= 60%", "accuracy >= -10%"] then, ["size_bytes <= 50%"] now',
        ),
        ({"objectives": ["accuracy", "latency_ms"]}, r'objectives: ["max accuracy", "min size_bytes"] then'),
        ({"space": TINY}, "space: "),
        ({"threads": 2}, "measure: "),
    ],
)
def test_another_configuration_is_refused(tmp_path, fake, change, told):
    fake.study(tmp_path).run(3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(StudyError) as caught:
        fake.study(tmp_path, **change).run(3)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path} holds a study of another configuration:\n  - {told}")
    assert message.count("\n  - ") == 1
    assert message.endswith("Undo the change to go on with it, or search anew under another name or --output.")
    assert {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"
    } == before


def test_a_study_that_knew_of_no_pairs_goes_on(tmp_path, fake):
    """One of an earlier version, which did not look for layers to equalise."""
    known = fake.make(blob_task(), tmp_path, None, target=None).facts
    fake.facts = replace(known, structure=replace(structure(), pairs=(), unpaired=()))
    first = fake.study(tmp_path)
    first.run(2)
    assert first.facts.structure.pairs == ()
    fake.facts = None
    again = fake.study(tmp_path)
    again.run(3)
    assert again.facts.structure.pairs == (("0", ("4",)),)
    assert recipes(again)[:2] == recipes(first)


def test_equalisation_is_searched(tmp_path, fake):
    found = fake.study(tmp_path, space=replace(TINY, equalize=("none", "weights", "activations")), budget=())
    found.run(20)
    bits = {4, 8}
    ways = {(step.by, recipe.of(Quantize)[0].weight_bits) for recipe in recipes(found) for step in recipe.of(Equalize)}
    assert ways == {(by, count) for by in ("weights", "activations") for count in bits}


def test_other_weights_are_refused(tmp_path):
    study(tmp_path, space=TINY).run(1)

    def other():
        net = network()
        with torch.no_grad():
            net[0].weight[0, 0, 0, 0] += 1e-3
        return net

    task = Task("blobs", other, train=blobs(128, 1), validation=blobs(100, 2), test=blobs(100, 3))
    with pytest.raises(
        StudyError, match=r"weights: .* then, .* now; a network that is trained anew at every start needs a seed"
    ):
        study(tmp_path, space=TINY, task=task).run(1)


def _search_elsewhere(fake, folder, ready, go_on):
    torch.set_num_threads(1)  # a forked process has none of the threads that its parent computes with

    class Wait(Quiet):
        def finished(self, *_):
            ready.set()
            go_on.wait(60)

    fake.study(folder, Wait(), space=TINY).run(2)


def test_a_second_process_is_refused(tmp_path, fake):
    context = multiprocessing.get_context("fork")
    ready, go_on = context.Event(), context.Event()
    process = context.Process(target=_search_elsewhere, args=(fake, tmp_path, ready, go_on))
    process.start()
    assert ready.wait(60)
    with pytest.raises(
        StudyError, match=rf"is in use by another search \(process {process.pid}\); wait for its end, stop it, or"
    ):
        fake.study(tmp_path, space=TINY).run(2)
    assert len(open_front(tmp_path).candidates) == 1, "looking is allowed"
    go_on.set()
    process.join(60)
    assert process.exitcode == 0
    fake.study(tmp_path, space=TINY).run(2)


def test_the_time_ends_it(tmp_path, fake):
    listener = Stop()
    found = fake.study(tmp_path, listener)
    front = found.run(10_000, time_limit=2.0)
    assert 0 <= len(front.candidates) < 2000
    end = f"the time is used up after {len(front.candidates)} of 10000 trials"
    assert [text for text in listener.said if text.startswith(end)]
    assert (tmp_path / "report" / "front.html").exists()
    assert (tmp_path / "finalists.json").exists()


def test_ctrl_c_leaves_the_report_of_the_front_so_far(tmp_path, fake):
    part = fake.study(tmp_path, Stop(9))
    with pytest.raises(KeyboardInterrupt):
        part.run(20)
    assert len(part.front.candidates) == 9
    assert (tmp_path / "report" / "front.html").exists()
    assert not (tmp_path / "finalists.json").exists()
    listener = Stop()
    fake.study(tmp_path, listener).run(20)
    assert listener.checks == 0, "the preflight is a new study's"
    assert listener.said[0] == f"going on with the study in {tmp_path}: 9 trials finished"


def test_ctrl_c_while_it_remembers_comes_after(tmp_path, fake, monkeypatch):
    """Between the journal and the sampler nothing may be broken off. (Nothing but a patch gets in between there.)"""
    tell = Trials._tell

    def interrupted(trials, *arguments):
        if len(trials.history.candidates) == 5:
            os.kill(os.getpid(), 2)
        tell(trials, *arguments)

    monkeypatch.setattr(Trials, "_tell", interrupted)
    found = fake.study(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        found.run(20)
    assert len(found.candidates) == 5
    assert len(found.trials.optuna.trials) == sum(c.picks is not None for c in found.candidates)


def test_a_failed_preflight_leaves_nothing(tmp_path, fake):
    folder = tmp_path / "studies" / "s"
    with pytest.raises(ConfigError, match="cannot be kept: the smallest recipe of this space reaches"):
        fake.study(folder, budget=("size_bytes <= 1%",)).run(5)
    assert not folder.exists()
    folder.mkdir()
    (folder / "candidates").mkdir()
    (folder / "candidates" / "mine.txt").write_text("the user's")
    with pytest.raises(ConfigError):
        fake.study(folder, budget=("size_bytes <= 1%",)).run(5)
    assert [str(p.relative_to(folder)) for p in sorted(folder.rglob("*"))] == ["candidates", "candidates/mine.txt"]
    fake.study(folder).run(9)
    assert (folder / "candidates" / "mine.txt").exists(), "only files of the study are ever removed"


def test_what_a_kill_leaves_behind_is_cleaned_up(tmp_path, fake):
    fake.study(tmp_path).run(9)
    left = [
        tmp_path / ".study.json.123.partial",
        tmp_path / "candidates" / f".{'0' * 16}.safetensors.123.partial",
        tmp_path / "report" / ".front.html.99.part",
        tmp_path / "candidates" / f"{'0' * 16}.safetensors",
    ]
    for path in left:
        path.write_text("half")
    with (tmp_path / "trials.jsonl").open("a") as stream:
        stream.write('{"candidate": {"num')
    assert len(open_front(tmp_path).candidates) == 9
    assert (tmp_path / "trials.jsonl").read_text().endswith("num"), "who only looks changes nothing"
    found = fake.study(tmp_path)
    found.run(10)
    assert not [path for path in left if path.exists()]
    assert [r["candidate"]["number"] for r in records(tmp_path) if "candidate" in r] == list(range(10))


def test_a_deleted_file_of_a_finalist_is_made_again(tmp_path):
    part = study(tmp_path, Stop(6))
    with pytest.raises(KeyboardInterrupt):
        part.run(7)
    member = part.front.members[0]
    path = tmp_path / "candidates" / f"{member.recipe.key}.safetensors"
    data = path.read_bytes()
    path.unlink()
    study(tmp_path).run(6)
    assert path.read_bytes() == data


def test_what_is_lost_of_the_finalists_is_measured_again_and_nothing_else(tmp_path, fake):
    """Scores that somebody deleted, a comparison with the simulation that a kill prevented, a study of an older
    version.
    """
    asked = fake.finalists
    fake.study(tmp_path, budget=()).run(20)
    path = tmp_path / "finalists.json"
    whole = path.read_text()
    members = [m.recipe.key for m in open_front(tmp_path).members]
    assert asked == ["baseline", *members]

    def resumed():
        asked.clear()
        fake.study(tmp_path, budget=()).run(20)
        assert json.loads(path.read_text()) == json.loads(whole)
        return list(asked)

    assert resumed() == []
    (tmp_path / "finalists" / f"{members[0]}.npy").unlink()
    assert resumed() == members[:1]
    known = json.loads(whole)
    path.write_text(json.dumps({key: entry if key != members[1] else {} for key, entry in known.items()}))
    asked.clear()
    fake.study(tmp_path, budget=()).run(20)
    assert asked == [], "what did not compute is not tried again"
    half = {name: metric for name, metric in known[members[1]].items() if not name.startswith("parity")}
    path.write_text(json.dumps({**known, members[1]: half}))
    assert resumed() == [], "what was measured on the test split stays"
    old = {key: {name: entry[name] for name in ("accuracy", "size_bytes")} for key, entry in known.items()}
    path.write_text(json.dumps(old))
    for scores in (tmp_path / "finalists").iterdir():
        scores.unlink()
    assert open_front(tmp_path).clusters == {}
    assert resumed() == ["baseline", *members]


def test_numbers_that_the_test_split_does_not_give_are_left_out(tmp_path, fake):
    fake.refuses = Diverged("metric 'accuracy' returned nan")
    listener = Stop()
    front = fake.study(tmp_path, listener).run(9)
    assert "warning: the baseline has no numbers as a finalist: metric 'accuracy' returned nan" in listener.said
    assert front.test_baseline is None
    assert open_front(tmp_path) == front


def test_mlflow_that_fails_in_the_middle_does_not_stop_the_search(tmp_path, fake, monkeypatch):
    from paretorch.results.tracking import tracker as tracking

    events = []

    class Tracker:
        run_id = "run"

        def __init__(self, *_):
            pass

        def start(self, params, texts, environment):
            events.append(("start", sorted(texts)))

        def sync(self, candidates, volumes, picks):
            assert len(candidates) == len(volumes)
            events.append(("sync", len(candidates)))
            return 0

        def log(self, candidate, volume, member, picks):
            events.append(("log", candidate.number))
            if candidate.number == 3:
                raise StudyError("MLflow store is away")

        def finish(self, front, report, note, status, more=None):
            events.append((status, len(front.candidates)))

    monkeypatch.setattr(tracking, "Tracker", Tracker)
    listener = Stop()
    found = fake.study(tmp_path, listener, mlflow=None, config={"a": 1}, config_text="a: 1")
    found.run(9)
    assert events == [
        ("start", ["config.yaml", "config_resolved.json", "study.json"]),
        ("sync", 0),
        ("log", 0),
        ("log", 1),
        ("log", 2),
        ("log", 3),
        ("sync", 9),
        ("FINISHED", 9),
    ]
    assert "warning: MLflow store is away. The search goes on without MLflow" in "".join(listener.said)
    events.clear()
    with pytest.raises(KeyboardInterrupt):
        fake.study(tmp_path, Stop(10), mlflow=None).run(12)
    assert events[-1] == ("KILLED", 10)
    fake.fails = lambda recipe: ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        fake.study(tmp_path, mlflow=None).run(12)
    assert events[-1] == ("FAILED", 10)


# --- what is asked for wrongly ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"sampler": "tpa"}, r"search.sampler = 'tpa': choose from ehvi, tpe, nsga2, nsga3, gp, random, qmc"),
        (
            {"objectives": ["accuracy", "bytes"]},
            r"objectives: unknown metric 'bytes'; choose from accuracy, size_bytes",
        ),
        ({"budget": ["f1 >= 0.5"]}, r"unknown metric 'f1'; choose from accuracy"),
    ],
)
def test_wrong_arguments(tmp_path, wrong, told):
    with pytest.raises(ConfigError, match=told):
        study(tmp_path / "s", **wrong)
    assert not (tmp_path / "s").exists()


def test_folders_that_hold_no_study(tmp_path, fake):
    with pytest.raises(
        StudyError, match=r"there is no study in .*: it has no study\.json; name the folder that a search has written"
    ):
        open_front(tmp_path)
    (tmp_path / "trials.jsonl").write_text("{}\n")
    with pytest.raises(StudyError, match=r"holds trials\.jsonl without the study\.json they belong to"):
        fake.study(tmp_path).run(1)
    assert (tmp_path / "trials.jsonl").exists()
    (tmp_path / "study.json").write_text("[]")
    with pytest.raises(StudyError, match=r"study\.json is damaged"):
        open_front(tmp_path)
    (tmp_path / "study.json").write_text('{"version": 99}')
    with pytest.raises(StudyError, match="written by a newer paretorch"):
        open_front(tmp_path)


def test_a_missing_baseline_is_named(tmp_path, fake):
    fake.study(tmp_path).run(1)
    (tmp_path / "baseline.safetensors").unlink()
    with pytest.raises(StudyError, match=r"baseline\.safetensors is missing, and every latency is relative to it"):
        fake.study(tmp_path).run(2)


def test_a_smallest_recipe_that_diverges_is_a_warning(tmp_path, fake):
    fake.fails = lambda recipe: Diverged("made up") if len(fake.ran) == 1 else None
    found = []

    class Checked(Quiet):
        def checked(self, preflight):
            found.append(preflight)

    front = fake.study(tmp_path, Checked()).run(9)
    assert len(front.candidates) == 9
    assert "does not compute any more: made up" in found[0].warnings[0]


def test_without_test_data(tmp_path, fake):
    listener = Stop()
    task = Task("blobs", network, train=blobs(128, 1), validation=blobs(100, 2))
    front = fake.study(tmp_path, listener, task=task).run(9)
    assert not any("accuracy" in c.test or "latency_ratio" in c.test for c in front.members)
    assert all(c.test["parity_agreement"].value == 1 for c in front.members), "they are compared with their simulation"
    assert not front.clusters
    assert "the task has no test data: the front's numbers are the validation split's" in listener.said[-1]


# --- rungs and races --------------------------------------------------------------------------------------------------

LADDER = replace(SPACE, recovery=(Recover("finetune", 0.25), Recover("batchnorm"), Recover("finetune", 0.5, 0.02)))


def test_with_rungs_everybody_begins_untrained_and_the_best_climb(tmp_path, fake):
    found = fake.study(tmp_path, space=LADDER, rungs=True)
    found.run(45)
    names = [[step.epochs for step in c.recipe.of(Recover)] for c in found.candidates if not c.label]
    untrained, once, twice = ([i for i, n in enumerate(names) if n == epochs] for epochs in ([0], [0.25], [0.25, 0.5]))
    assert len(untrained) + len(once) + len(twice) == len(names)
    given = sum(
        c.label != "" and c.picks is not None for c in found.candidates
    )  # they stand on the foot too, and may climb
    assert len(untrained) + given > len(once) >= len(twice) > 0
    began = {}
    for c in found.candidates:
        if c.picks is None:
            continue
        same = tuple(pick for name, pick in sorted(c.picks.items()) if name != "recovery")
        assert c.label or c.picks["recovery"] == began.get(same, 0), "one rung at a time, from the foot"
        began[same] = c.picks["recovery"] + 1
    asked = [t.params["recovery"] for t in found.trials.optuna.trials if t.number >= len(found.candidates) - len(names)]
    assert sorted(set(asked)) == [0, 1, 2], "the sampler is told of every rung"
    assert found.promotions.ladder.describe().startswith(f"{len(found.promotions.ladder.rungs[0])} untrained, ")


def test_a_study_with_rungs_goes_on_as_if_it_had_not_been_interrupted(tmp_path, fake):
    whole = fake.study(tmp_path / "whole", space=LADDER, rungs=True)
    whole.run(30)
    for stop in (9, 17, 26):
        with pytest.raises(KeyboardInterrupt):
            fake.study(tmp_path / "part", Stop(stop), space=LADDER, rungs=True).run(30)
    part = fake.study(tmp_path / "part", space=LADDER, rungs=True)
    part.run(30)
    assert recipes(part) == recipes(whole)


def test_rungs_need_our_sampler_and_training(tmp_path, fake):
    with pytest.raises(ConfigError, match="only ehvi knows rungs"):
        fake.study(tmp_path, rungs=True, sampler="tpe")
    found = fake.study(tmp_path, space=TINY, rungs=True)
    found.run(2)
    assert not found.space.ladder


def test_whether_rungs_pay_is_found_out_once_and_kept(tmp_path, fake):
    """The made-up trials take no time at all, so training pays for rungs; with a slow trial it does not."""
    found = fake.study(tmp_path / "a", space=LADDER, rungs=None)
    found.run(3)
    assert found.space.ladder
    assert json.loads((tmp_path / "a" / "study.json").read_text())["rungs"] is True
    fake.seconds_per_epoch = 0.0
    assert fake.study(tmp_path / "a", space=LADDER, rungs=None).run(4)
    again = fake.study(tmp_path / "b", space=LADDER, rungs=None)
    again.run(3)
    assert not again.space.ladder


def test_a_hopeless_candidate_is_given_up_early(tmp_path):
    """90% zeros without any recovery ruin the network, and some hundred of 2,000 images are enough to see that."""
    data = {"train": blobs(128, 1), "validation": blobs(2000, 2), "test": None}
    space = Space(weight_bits=(Rule((2, 8)),), sparsity=(Rule((0.0, 0.9)),))
    found = study(
        tmp_path, space=space, budget=("accuracy >= -1%",), task=Task("blobs", network, batch_size=64, **data)
    )
    front = found.run(20)
    stopped = [c for c in found.candidates if c.state == "stopped"]
    assert stopped
    for c in stopped:
        metric = c.measurement.metrics["accuracy"]
        assert 256 <= metric.n < 2000
        assert metric.high < found.judge.baseline.value("accuracy") - 0.01
        assert "after" in c.reason
        assert c.reason.endswith("beyond doubt")
        assert c.number not in {m.number for m in front.members}
        assert not found.folder.candidates.packed(c.recipe).exists()
        with pytest.raises(ConfigError, match="has no file"):
            front.select(str(c.number))
    assert open_front(tmp_path) == front


def test_the_plan_is_said_before_the_first_trial(tmp_path, fake):
    listener = Stop()
    fake.study(tmp_path, listener, space=LADDER, rungs=True).run(12)
    plan = next(text for text in listener.said if text.startswith("plan"))
    assert all(name in plan for name in ("untrained (", "0.25 epochs (", "0.25 + 0.5 epochs (", "for the finalists"))


class Interrupted(Quiet):
    """Ctrl-C in some trial's fine-tuning, late in it; keeps the phases."""

    def __init__(self, at=""):
        self.at, self.phases = at, []

    def phase(self, text):
        self.phases.append(text)
        if text == self.at:
            raise KeyboardInterrupt


def test_an_interrupted_training_goes_on_from_its_last_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(recover_module, "KEEP_EVERY", 0.0)
    space = replace(TINY, recovery=(Recover("finetune", 5, 0.02),))

    def run(folder, listener):
        found = study(tmp_path / folder, listener, space=space, task=blob_task(batch_size=8))
        found.run(7)
        return {
            c.recipe: found.folder.candidates.packed(c.recipe).read_bytes()
            for c in found.front.members
            if c.recipe.of(Recover)
        }

    files = run("whole", Quiet())
    assert files
    heard = Interrupted()
    assert run("other", heard) == files
    trained = next(text for text in heard.phases if "70/80" in text)
    with pytest.raises(KeyboardInterrupt):
        run("part", Interrupted(trained))
    candidates = tmp_path / "part" / "candidates"
    assert len(list(candidates.glob("*.partial-training"))) == 1
    listener = Interrupted()
    assert run("part", listener) == files
    number = trained.partition(":")[0]
    again = [text for text in listener.phases if text.startswith(f"{number}: fine-tuning")]
    assert again == [f"{number}: fine-tuning 70/80"], "from the fifth epoch"
    assert not list(candidates.glob("*.partial-training"))
