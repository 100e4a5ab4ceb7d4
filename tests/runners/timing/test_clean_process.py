"""Packed files in a clean process: the same numbers as here, and nothing that stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from paretorch.errors import ExportFailed
from paretorch.runners.evaluate import EvaluationPlan
from paretorch.runners.files import packing
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.targets.catalog import as_target
from paretorch.runners.targets.roofline import Profile, analytic
from paretorch.runners.targets.target import Target
from paretorch.runners.task import Task, batches
from paretorch.runners.timing.clean_process import CleanProcess, process_for
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.quantize import Quantize

torch.set_num_threads(1)


def distance(outputs, targets):
    return -F.mse_loss(outputs, F.one_hot(targets, 10).float(), reduction="none").mean(1)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """A small network with its packed file and that of a compressed one; the metric shows every bit of the outputs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()
    data = TensorDataset(torch.randn(210, 1, 8, 8), torch.arange(210) % 10)
    task = Task(
        "t",
        lambda: net,
        train=data,
        validation=data,
        test=data,
        metric=distance,
        metric_name="closeness",
        batch_size=32,
    )
    found = LocalRunner(
        task, tmp_path_factory.mktemp("files"), MeasurementSettings(seconds=0.002, calibration_images=32)
    )
    _, packed = found.baseline()
    found.path(Recipe()).write_bytes(packed)
    found.run(SMALL)
    return found


SMALL = Recipe((Quantize("0", 8, 8), Quantize("3", 4)))


@pytest.mark.parametrize("plan", [EvaluationPlan(), EvaluationPlan(1, 1, 50), EvaluationPlan(3, 1, 16)])
def test_the_scores_are_those_of_this_process(runner, plan):
    runner.plan = plan
    with CleanProcess() as process:
        for recipe in (Recipe(), SMALL, Recipe()):
            found = process.scores(runner.path(recipe), runner.task, batches(runner.task, "test"), plan)
            assert np.array_equal(found, runner.scores(runner.path(recipe).read_bytes(), "test"))
        first = process._process.pid
        ratio = process.ratio(runner.path(SMALL), runner.path(Recipe()), np.zeros((1, 1, 8, 8), np.float32), 1, 0.01)
        assert process._process.pid == first, "one process for all of it"
    assert 0 < ratio.low <= ratio.value <= ratio.high
    assert ratio.n >= 6


def test_the_process_has_not_imported_torch(runner):
    with CleanProcess() as process:
        process.scores(runner.path(SMALL), runner.task, batches(runner.task, "test"), EvaluationPlan())
        mapped = Path(f"/proc/{process._process.pid}/maps").read_text()
    assert "onnxruntime" in mapped
    assert "libtorch" not in mapped


def test_a_file_that_cannot_be_run_is_a_result_and_the_next_one_is_measured(runner, tmp_path):
    broken = tmp_path / "broken.safetensors"
    data = bytearray(runner.path(SMALL).read_bytes())
    data[-3] ^= 1
    broken.write_bytes(data)
    with CleanProcess() as process:
        for path, told in ((broken, "SHA-256"), (tmp_path / "missing", "cannot be read: No such file")):
            with pytest.raises(ExportFailed, match=told):
                process.scores(path, runner.task, batches(runner.task, "test"), EvaluationPlan())
        with pytest.raises(ExportFailed, match=r"does not run in ONNX Runtime: .*invalid"):
            process.scores(
                runner.path(SMALL), runner.task, [(torch.zeros(2, 1, 5, 5), torch.zeros(2))], EvaluationPlan()
            )
        assert (
            len(process.scores(runner.path(SMALL), runner.task, batches(runner.task, "test"), EvaluationPlan())) == 210
        )


def test_a_process_that_dies_says_how_and_the_next_file_gets_another(runner):
    def images():
        for number, pair in enumerate(batches(runner.task, "test")):
            if number == 2:
                os.kill(process._process.pid, signal.SIGSEGV)
            yield pair

    with CleanProcess() as process:
        with pytest.raises(ExportFailed, match=r"was ended by signal 11 \(SIGSEGV\)"):
            process.scores(runner.path(SMALL), runner.task, images(), EvaluationPlan())
        assert (
            len(process.scores(runner.path(SMALL), runner.task, batches(runner.task, "test"), EvaluationPlan())) == 210
        )


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_it_ends_with_its_parent(number):
    """Whatever ends the parent, and whatever the process is doing."""
    code = (
        "import signal, time; from paretorch.runners.timing.clean_process import CleanProcess\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with CleanProcess() as process:\n"
        "    process._need(2); print(process._process.pid, flush=True); time.sleep(60)"
    )
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path},
    )
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    assert running(child)
    parent.send_signal(number)
    parent.wait(20)
    deadline = time.monotonic() + 20
    while running(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_another_target_is_measured_there(runner):
    """Eager PyTorch in the clean process, and a target of the user's own program in this one."""
    paths = [runner.path(SMALL), runner.path(Recipe())]
    batch = np.zeros((1, 1, 8, 8), np.float32)
    called = []

    def load(model, threads):
        called.append(threads)
        return as_target("onnxruntime").load(model, threads)

    plain = as_target("torch")
    for target, path in ((plain, paths[1]), (Target("mine", load), paths[0])):
        with process_for(target) as process:
            found = process.scores(path, runner.task, batches(runner.task, "test"), EvaluationPlan())
            assert len(found) == 210
            ratio = process.ratio(paths[1], paths[1], batch, 1, 0.05)
            assert 0 < ratio.low <= ratio.value <= ratio.high
    assert called
    np.testing.assert_array_equal(found, runner.scores(paths[0].read_bytes(), "test"))


def test_what_is_computed_is_exact(runner):
    target = analytic(Profile("npu", {"32x32": 1e9, "8x8": 4e9, "4x32": 1e9}, weight_bytes=1e9, activation_bytes=1e9))
    batch = np.zeros((1, 1, 8, 8), np.float32)
    with process_for(target) as process:
        found = process.ratio(runner.path(SMALL), runner.path(Recipe()), batch, 1, 0.05)
    assert found.low == found.value == found.high
    small, whole = (
        target.milliseconds(packing.unpack(runner.path(r).read_bytes()).SerializeToString(), 1)
        for r in (SMALL, Recipe())
    )
    assert found.value == pytest.approx(small / whole)
