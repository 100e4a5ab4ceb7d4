"""The whole way of a recipe: equal bytes for equal recipes, bytes as foretold, numbers of the file that was written."""

import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.utils.data import TensorDataset

from paretorch.errors import Diverged, TaskError
from paretorch.objectives import cost
from paretorch.objectives.objective import Budget
from paretorch.runners.files import packing
from paretorch.runners.graphs.onnx_export import operators
from paretorch.runners.local import LocalRunner
from paretorch.runners.runner import RunTrial
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.targets.runtime import session
from paretorch.runners.task import Task
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.cluster import Cluster
from paretorch.spaces.techniques.lowrank import LowRank
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.sparsify import Sparsify
from paretorch.spaces.techniques.student import Student

MIXED = Recipe(
    (
        Student(("layer1.1",)),
        Prune("down", 16),
        Sparsify("fc", 0.5),
        Quantize("stem", 8, 8),
        Quantize("down", 3),
        Quantize("fc", 16),
    )
)
THIN = Recipe(
    (
        LowRank("down", 8),
        Sparsify("down", 0.5),
        Cluster("down", 3),
        LowRank("fc", 4),
        Quantize("fc", 8, 8),
        Cluster("stem", 4),
        Recover("finetune", 0.5, 0.01),
    )
)
TRAINED = Recipe((*MIXED.steps, Recover("finetune", 0.5, 0.01)))


@pytest.fixture
def runner(network, task_of, tmp_path):
    model, x = network("residual")
    return LocalRunner(task_of(model, x), tmp_path, MeasurementSettings(seconds=0.02, calibration_images=128))


@pytest.mark.parametrize("recipe", [Recipe(), MIXED, TRAINED, THIN], ids=["untouched", "mixed", "trained", "thin"])
def test_equal_recipes_give_equal_bytes(recipe, runner):
    runner.use_baseline(runner.build(Recipe()))
    found = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        runner.run(recipe)
        found.append(runner.path(recipe).read_bytes())
    assert found[0] == found[1]
    preview = runner.build(recipe, recovery=False)
    # Up to the deflated graph, whose small tensors hold other numbers: a few bytes.
    assert abs(len(preview) - len(found[0])) <= 64
    assert operators(packing.unpack(preview)) == operators(packing.unpack(found[0]))


def test_a_measurement_is_that_of_the_file(runner):
    baseline, packed = runner.baseline()
    assert baseline.value("accuracy") == 1  # the task is to repeat this network
    assert baseline.value("size_bytes") == len(packed)
    heard, known = [], {}
    found = runner.run(MIXED, heard.append, known=known)
    data = runner.path(MIXED).read_bytes()
    assert found.value("size_bytes") == len(data)
    assert found.value("onnx_bytes") == packing.unpack(data).ByteSize()
    assert found.value("macs") == cost.macs(runner.structure, MIXED) < baseline.value("macs")
    hits = total = 0
    for x, y in runner.validation():
        outputs = session(packing.unpack(data)).run(None, {"input": x.numpy()})[0]
        hits, total = hits + int((outputs.argmax(1) == y.numpy()).sum()), total + len(y)
    assert found.metrics["accuracy"].value == hits / total
    assert found.metrics["accuracy"].n == total
    assert found.metrics["latency_ms"].low <= found.value("latency_ms") <= found.metrics["latency_ms"].high
    assert heard == ["compressing", "exporting", "timing", "evaluating"]
    assert set(known) == {"size_bytes", "onnx_bytes", "zstd_bytes", "macs", "latency_ms"}
    again = runner.measure_again(data)
    assert again["accuracy"].value == found.value("accuracy")


def test_a_trial_over_the_budget_ends_before_training_and_nothing_is_written(runner):
    _, packed = runner.baseline()
    runner.files.scores(Recipe()).unlink()
    phases = []
    budget = Budget.parse(["size_bytes <= 1%"])
    request = RunTrial(TRAINED, budget=budget, baseline={"size_bytes": float(len(packed))}, time_first=True)
    outcome = runner.submit(request, phases.append).result()
    assert (outcome.measurement, outcome.failure.state) == (None, "over_budget")
    assert outcome.failure.excess["size_bytes <= 1%"] > 1
    assert phases[-1] == "measured before training"
    assert not [phase for phase in phases if "fine-tuning" in phase]
    assert list(runner.files.directory.iterdir()) == []


def test_zeros_stay_in_the_file_after_training(runner):
    recipe = Recipe(
        (Sparsify("down", 0.75), Sparsify("stem", 0.5), Quantize("stem", 6, 8), Recover("finetune", 0.5, 0.05))
    )
    graph = packing.unpack(runner.build(recipe)).graph
    tensors = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    assert (tensors["down.weight"] == 0).sum() == round(0.75 * tensors["down.weight"].size)
    assert (tensors["stem.weight_q"] == 0).sum() >= round(0.5 * tensors["stem.weight_q"].size)


@pytest.mark.parametrize("activations", [8, 32])
@pytest.mark.parametrize(("bits", "share"), [(8, 0.28), (4, 0.17), (2, 0.10)])
def test_bits_of_a_network_of_a_megabyte_show_in_both_files(bits, share, activations, network, task_of, tmp_path):
    model, x = network("residual", 48, 96)
    runner = LocalRunner(task_of(model, x), tmp_path, MeasurementSettings(calibration_images=64))
    float_packed = runner.build(Recipe())
    assert len(float_packed) > 1_000_000
    steps = tuple(Quantize(layer.name, bits, activations) for layer in runner.structure.layers)
    packed = runner.build(Recipe(steps), recovery=False)
    assert len(packed) <= share * len(float_packed)
    assert packing.unpack(packed).ByteSize() <= share * packing.unpack(float_packed).ByteSize()


def steered_task():
    class Steered(nn.Module):
        """Control flow that tracing freezes at what the example took."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            y = self.a(x)
            return self.b(y if len(x) < 10 else -y)

    torch.manual_seed(0)
    model = Steered().eval()
    data = TensorDataset(torch.randn(64, 4), torch.zeros(64, dtype=torch.long))
    return Task("steered", lambda: model, data, data)


def test_an_export_that_computes_something_else_is_noticed_at_the_baseline(tmp_path):
    runner = LocalRunner(steered_task(), tmp_path, MeasurementSettings(seconds=0.02))
    with pytest.raises(TaskError, match="control flow on the input"):
        runner.baseline()


def failing():
    raise RuntimeError("no such checkpoint")


@pytest.mark.parametrize(
    ("factory", "message"),
    [(failing, "its model function failed: RuntimeError: no such checkpoint"), (lambda: {}, "returned dict")],
)
def test_a_model_function_that_fails_is_explained(factory, message, tmp_path):
    data = TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
    with pytest.raises(TaskError, match=message):
        LocalRunner(Task("t", factory, data, data), tmp_path)


def test_training_that_explodes_is_a_result_without_a_file(runner):
    runner.use_baseline(runner.build(Recipe()))
    recipe = Recipe((Quantize("stem", 2), Recover("finetune", 8, 1e6)))
    with pytest.raises(Diverged):
        runner.run(recipe)
    assert list(runner.files.directory.iterdir()) == []


def test_the_given_network_is_never_changed(runner):
    before = {name: value.clone() for name, value in runner.builder.model.state_dict().items()}
    runner.build(TRAINED)
    after = runner.builder.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_without_a_baseline_is_a_mistake(runner):
    with pytest.raises(ValueError, match="baseline"):
        runner.run(Recipe())


def test_training_goes_on_from_kept_weights_and_gives_the_same_bytes(runner):
    first, second = Recover("finetune", 7, 0.02), Recover("finetune", 7, 0.01)
    short, long = Recipe((*MIXED.steps, first)), Recipe((*MIXED.steps, first, second))
    phases = []

    def trainings():
        """How many trainings were begun since the last question."""
        steps = [phase for phase in phases if phase.startswith("fine-tuning 10/")]
        phases.clear()
        return len(steps)

    whole = runner.build(long, phases.append)
    assert list(runner.files.directory.iterdir()) == []
    assert trainings() == 2
    runner.builder.build(short, keep_trained=True)
    assert runner.files.trained(short).exists()
    assert runner.build(long, phases.append) == whole
    assert trainings() == 1
    runner.files.trained(short).write_bytes(b"damaged")
    assert runner.build(long, phases.append) == whole
    assert trainings() == 2
    assert runner.build(short) != whole


def test_the_teacher_answers_once_for_all_candidates(runner, tmp_path):
    """Reused or computed anew, the file is the same; a short training does not ask for all of them."""
    recipes = [Recipe((Quantize("stem", bits), Recover("finetune", 0.5, 0.02))) for bits in (2, 3)]
    runner.build(Recipe((Quantize("stem", 2), Recover("finetune", 0.2, 0.02))))
    runner.build(Recipe((Quantize("stem", 2), Recover("finetune", 0.5, 0.02, distill=0))))
    assert "teacher_logits" not in vars(runner.builder), "nobody has asked for them yet"
    first = runner.build(recipes[0])
    logits = vars(runner.builder)["teacher_logits"]
    files = [first, runner.build(recipes[1])]
    assert runner.builder.teacher_logits is logits
    other = LocalRunner(runner.task, tmp_path / "other", MeasurementSettings(seconds=0.02, calibration_images=128))
    assert [other.build(recipe) for recipe in reversed(recipes)] == files[::-1]
