"""The protocol of `paretorch measure`, on simulated times: no test here looks at the clock."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from paretorch.errors import ArtifactError, ConfigError, TargetError
from paretorch.objectives.measurement import Estimate
from paretorch.runners.graphs.float_graph import export_float
from paretorch.runners.timing.compare import (
    compare,
    estimate,
    onnx_file,
    parse_precision,
    precise,
    sample,
    verdict,
    warm_up,
)


class Machine:
    """A clock that only moves when something runs, and the noise that meets a run at a time."""

    def __init__(self, seed, noise, drift=lambda now: 1.0):
        self.rng, self.noise, self.drift, self.now, self.order = np.random.default_rng(seed), noise, drift, 0.0, []

    def timer(self, name, milliseconds):
        def block():
            took = milliseconds * self.drift(self.now) * self.noise(self.rng)
            self.now += took / 1e3
            self.order.append(name)
            return took

        return block

    def clock(self):
        return self.now


def measured(seed, noise, ratio=1.0, drift=lambda now: 1.0, precision=0.02, seconds=20.0):
    machine = Machine(seed, noise, drift)
    timers = [machine.timer("candidate", ratio), machine.timer("baseline", 1.0)]
    times = sample(timers, precision, seconds, seed, machine.clock)
    return estimate(times), machine


# Of a few hundred cases 95% are 92 to 98% by chance alone; with outliers it is 94% in the long run.
ENOUGH = 0.92
NOISE = {
    "quiet": lambda rng: math.exp(0.005 * rng.standard_normal()),
    "normal": lambda rng: math.exp(0.05 * rng.standard_normal()),
    "long tail": lambda rng: 1 + 0.06 * rng.exponential(),
    "heavy tail": lambda rng: math.exp(0.03 * np.clip(rng.standard_t(2), -100, 100)),
    "two speeds": lambda rng: (1.0 if rng.random() < 0.5 else 1.06) * math.exp(0.01 * rng.standard_normal()),
    "outliers": lambda rng: (8.0 if rng.random() < 0.03 else 1.0) * math.exp(0.04 * rng.standard_normal()),
}
DRIFT = {
    "steady": lambda now: 1.0,
    "waves": lambda now: 1 + 0.3 * math.sin(3 * now),
    "slower and slower": lambda now: 1 + now,
}


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_the_interval_holds_the_true_ratio_in_95_of_100_cases(noise):
    found = [measured(seed, noise, 0.8)[0] for seed in range(500)]
    assert np.mean([m.low <= 0.8 <= m.high for m in found]) >= ENOUGH
    assert all(m.low <= m.value <= m.high for m in found)


@pytest.mark.parametrize("drift", DRIFT.values(), ids=DRIFT)
def test_a_drift_that_meets_both_does_no_harm(drift):
    found = [measured(seed, NOISE["normal"], 0.8, drift)[0] for seed in range(400)]
    assert np.mean([m.low <= 0.8 <= m.high for m in found]) >= ENOUGH
    assert np.median([m.value for m in found]) == pytest.approx(0.8, rel=0.003)


def test_being_second_costs_neither_of_them():
    """The run after another one is 5% slower; in a fixed order one file would pay all of it."""
    found = []
    for seed in range(100):
        machine, count = Machine(seed, NOISE["normal"]), iter(range(10**6))
        machine.drift = lambda now, count=count: 1 + 0.05 * (next(count) % 2)
        times = sample([machine.timer("a", 1.0), machine.timer("b", 1.0)], 0.02, 20, seed, machine.clock)
        found.append(estimate(times))
    assert np.mean([m.low <= 1 <= m.high for m in found]) >= 0.9
    assert np.median([m.value for m in found]) == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_a_file_is_as_fast_as_itself(noise):
    told = [verdict(measured(seed, noise)[0]) for seed in range(300)]
    assert told.count("no significant difference") >= ENOUGH * len(told)


@pytest.mark.parametrize(("ratio", "word"), [(0.9, "faster"), (1.1, "slower")])
def test_a_clear_difference_is_told(ratio, word):
    told = [verdict(measured(seed, NOISE["normal"], ratio)[0]) for seed in range(100)]
    assert told.count(word) >= 95


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.8, 0.9, "faster"),
        (1.1, 1.2, "slower"),
        (0.9, 1.1, "no significant difference"),
        (0.9, 1.0, "no significant difference"),
        (1.0, 1.1, "no significant difference"),
    ],
)
def test_the_verdict_is_the_side_on_which_the_whole_interval_lies(low, high, word):
    assert verdict(Estimate((low + high) / 2, low, high, 20)) == word


def test_it_ends_when_the_interval_is_narrow_enough():
    for precision in (0.05, 0.02, 0.01):
        found, machine = measured(0, NOISE["normal"], precision=precision)
        assert precise(found, precision)
        assert machine.now < 20
    counts = [measured(0, NOISE["normal"], precision=p)[0].n for p in (0.05, 0.02, 0.01)]
    assert counts == sorted(counts)
    # looked at after 20, 40, 80, ... pairs only
    assert all(math.log2(n / 20).is_integer() for n in counts)
    assert measured(0, NOISE["quiet"])[0].n == 20


def test_it_ends_with_the_time_limit():
    found, machine = measured(0, NOISE["normal"], precision=0.0001, seconds=0.5)
    assert 0.5 <= machine.now < 0.51
    assert not precise(found, 0.0001)
    found, machine = measured(0, NOISE["normal"], precision=0.0001, seconds=1e-6)
    assert found.n == 6
    assert found.low < found.high


def test_the_order_is_drawn_within_pairs_and_from_the_seed():
    _, machine = measured(3, NOISE["normal"])
    pairs = list(zip(machine.order[::2], machine.order[1::2], strict=True))
    assert set(pairs) == {("candidate", "baseline"), ("baseline", "candidate")}
    assert measured(3, NOISE["normal"])[1].order == machine.order
    assert measured(4, NOISE["normal"])[1].order[: len(machine.order)] != machine.order


def test_one_file_alone_is_estimated_by_its_times():
    found = []
    for seed in range(300):
        machine = Machine(seed, NOISE["normal"])
        found.append(estimate(sample([machine.timer("it", 2.5)], 0.02, 20, seed, machine.clock)))
    assert np.mean([m.low <= 2.5 <= m.high for m in found]) >= ENOUGH
    assert all(precise(m, 0.02) for m in found)


def test_warm_up_waits_until_times_settle():
    for wait in (0, 40):
        machine = Machine(0, NOISE["quiet"])
        machine.drift = lambda now, m=machine, wait=wait: 1 + 0.2 * max(0, wait - len(m.order)) / 4
        warm_up([machine.timer("a", 1.0), machine.timer("b", 1.0)], 100, machine.clock)
        assert 20 + 0.6 * wait <= len(machine.order) <= 40 + wait
        assert machine.order.count("a") == machine.order.count("b")


def test_warm_up_ends_with_its_time():
    machine = Machine(0, NOISE["quiet"])
    machine.drift = lambda now: 0.97 ** len(machine.order)  # faster and faster
    warm_up([machine.timer("a", 100.0)], 2, machine.clock)
    assert 2 <= machine.now < 2.2
    slow = Machine(0, NOISE["quiet"])
    warm_up([slow.timer("a", 9000.0)], 2, slow.clock)
    assert len(slow.order) == 2


def test_looking_after_every_pair_would_hold_the_true_ratio_less_often():
    """Why the number of pairs doubles between looks."""
    rng = np.random.default_rng(0)

    def covered(looks):
        hits = 0
        for _ in range(500):
            values = np.exp(0.07 * rng.standard_normal((400, 1)))
            for n in looks:
                found = estimate(values[:n])
                if precise(found, 0.02):
                    break
            hits += found.low <= 1 <= found.high
        return hits / 500

    assert covered([20, 40, 80, 160, 320]) > covered(range(20, 400)) + 0.01


@pytest.mark.parametrize(("text", "value"), [("2%", 0.02), (" 0.5 %", 0.005), ("0.1", 0.1)])
def test_precisions(text, value):
    assert parse_precision(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["0%", "0", "-1%", "2", "100%", "much", "", "%", "nan", "inf%"])
def test_bad_precisions(text):
    with pytest.raises(ConfigError, match=r"above 0% and below 100%, such as 2% or 0\.02"):
        parse_precision(text)


# --- the process ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, width in (("small", 8), ("large", 32)):
        net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)).eval()
        (folder / f"{name}.onnx").write_bytes(export_float(net, torch.randn(2, 6)).SerializeToString())
    (folder / "deploy").mkdir()
    (folder / "deploy" / "model.onnx").write_bytes((folder / "small.onnx").read_bytes())
    (folder / "text.onnx").write_text("this is no network")
    return folder


def test_two_files(files):
    before = os.sched_getaffinity(0)
    found = compare([files / "deploy", files / "large.onnx"], seconds=0.05, batch=4)
    assert found.ratio is not None
    assert found.verdict == verdict(found.ratio)
    assert found.reached == precise(found.ratio, 0.02)
    assert [m.n for m in (*found.ms, found.ratio)] == [found.pairs] * 3
    assert found.pairs >= 6
    for metric in (*found.ms, found.ratio):
        assert 0 < metric.low <= metric.value <= metric.high
    assert found.inputs == ({"input": "float32[4, 6]"},) * 2
    assert found.environment["clock"] == "CPU time of the thread"
    assert os.sched_getaffinity(0) == before


def test_one_file_on_as_many_threads_as_there_are_cores(files):
    threads = len(os.sched_getaffinity(0))
    found = compare([files / "small.onnx"], seconds=0.05, threads=threads, shapes={"input": (2, 6)})
    assert (found.ratio, found.verdict, len(found.ms)) == (None, None, 1)
    assert found.environment["threads"] == str(threads)
    assert found.environment["clock"] == ("wall clock" if threads > 1 else "CPU time of the thread")
    assert found.inputs == ({"input": "float32[2, 6]"},)


def test_the_process_needs_no_torch():
    code = "import sys, paretorch.runners.timing.compare; print({name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "onnxruntime" in loaded.stdout
    for heavy in ("torch", "optuna", "mlflow", "pandas", "onnx"):
        assert repr(heavy) not in loaded.stdout


def test_files_that_are_none(files):
    with pytest.raises(ArtifactError, match=r"there is no file .*gone.onnx; name an .onnx file, or a directory"):
        compare([files / "small.onnx", files / "gone.onnx"])
    with pytest.raises(ArtifactError, match=r"holds no model.onnx"):
        onnx_file(files)
    with pytest.raises(ArtifactError, match=r"text.onnx is no ONNX model that ONNX Runtime can load"):
        compare([files / "text.onnx"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"shapes": {"input": (1, 5)}}, r"small.onnx: input 'input' is \[batch, 6\] in the file, which the shape 1,5"),
        ({"shapes": {"image": (1, 6)}}, "--shape 'image': there is no such input; inputs: input"),
    ],
)
def test_shapes_that_do_not_fit(files, options, told):
    with pytest.raises(ConfigError, match=told):
        compare([files / "small.onnx"], **options)


def test_bad_options_come_all_at_once(files):
    with pytest.raises(ConfigError) as caught:
        compare([files / "small.onnx"], threads=0, batch=0, precision=0.0, seconds=0.0)
    assert len(caught.value.problems) == 4
    assert "choose from 1 to" in caught.value.problems[0]


def test_a_process_that_dies_is_told(files, monkeypatch):
    monkeypatch.setenv("PYTHONMALLOC", "nonsense")  # with which no Python starts
    with pytest.raises(TargetError, match=r"ended with code 1 .*PYTHONMALLOC"):
        compare([files / "small.onnx"])
