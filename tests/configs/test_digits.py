"""The quickstart's task: accurate, small, fast, and the same in every process."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import paretorch
from paretorch.configs.load import load
from paretorch.configs.plugins import load_task
from paretorch.runners.compression.trace import trace
from paretorch.runners.task import batches, example_input, score

CONFIG = Path(paretorch.__file__).parent / "configs" / "digits.yaml"
HASH = (
    "import hashlib; print(hashlib.sha256(b''.join(v.numpy().tobytes() for v in "
    "net.state_dict().values())).hexdigest())"
)


@pytest.fixture(scope="module")
def task():
    return load_task(load(CONFIG))


def test_it_is_accurate_and_small(task):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    started = time.process_time()
    net = task.model()
    assert time.process_time() - started < 20, "some 3 seconds on a free core"
    assert torch.equal(torch.get_rng_state(), state), "training leaves the caller's random numbers alone"
    assert torch.get_num_threads() == threads
    assert 50_000 <= sum(p.numel() for p in net.parameters()) <= 60_000
    assert not net.training
    with torch.no_grad():
        found = score(task, ((net(x), y) for x, y in batches(task, "validation")))
    assert found.value >= 0.975


def test_a_model_is_a_fresh_copy_and_is_not_trained_again(task):
    first = task.model()
    started = time.process_time()
    second = task.model()
    assert time.process_time() - started < 0.5
    with torch.no_grad():
        first.fc.weight.zero_()
    assert float(second.fc.weight.detach().abs().sum()) > 0
    assert float(task.model().fc.weight.detach().abs().sum()) > 0


def test_every_technique_of_the_search_has_something_to_do(task):
    structure = trace(task.model(), example_input(task, 16))
    assert len(structure.layers) == 8
    assert sorted(structure.blocks) == ["layer1.0", "layer2.0"]
    assert len(structure.folds) == 7
    assert structure.groups
    kinds = {axis.kind for axis in load(CONFIG).to_space().axes(structure) if len(axis.choices) > 1}
    assert kinds == {"width", "depth", "channels", "sparsity", "weight_bits", "activation_bits", "recovery"}


def test_the_splits_are_disjoint_and_stratified(task):
    sizes = [len(task.train), len(task.validation), len(task.test)]
    assert sizes == [1078, 359, 360]
    seen = [set() for _ in sizes]
    for found, data in zip(seen, (task.train, task.validation, task.test), strict=True):
        found.update(hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in data.images)
        counts = torch.bincount(torch.tensor(data.labels), minlength=10) / len(data)
        assert float((counts - 0.1).abs().max()) < 0.01
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def test_only_training_images_are_shifted(task):
    image = task.train.images[0]
    versions = {hashlib.sha256(task.train[0][0].numpy().tobytes()).hexdigest() for _ in range(40)}
    assert 2 <= len(versions) <= 9
    assert task.train[0][0].shape == image.shape
    assert torch.equal(task.validation[0][0], task.validation.images[0])


def test_every_process_gets_the_same_weights(task):
    code = (
        "import torch; torch.manual_seed(123); torch.set_num_threads(2);"
        "from pathlib import Path; from paretorch.configs.load import load;"
        "from paretorch.configs.plugins import load_task;"
        f"net = load_task(load(Path({str(CONFIG)!r}))).model(); {HASH}"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = hashlib.sha256(b"".join(v.numpy().tobytes() for v in task.model().state_dict().values())).hexdigest()
    assert run.stdout.strip() == here
