"""Students that the task makes: another architecture, compressed, trained and measured as any candidate."""

import json
from dataclasses import asdict, replace

import onnx
import pytest
import torch
from torch import nn

from paretorch.errors import RecipeError, TaskError
from paretorch.objectives import cost
from paretorch.runners.files import packing
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import MeasurementSettings
from paretorch.spaces.plain import plain
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.sparsify import Sparsify
from paretorch.spaces.techniques.student import Student


def small():
    """Other layers under other names, one of a name and a shape that the network has too; without weights of its
    own.
    """
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


@pytest.fixture
def runner(network, task_of, tmp_path):
    model, x = network("residual")
    task = task_of(model, x, batch_size=32, students={"small": small})
    return LocalRunner(task, tmp_path, MeasurementSettings(calibration_images=64, seconds=0.05))


MACS = {"0": 3 * 24 * 9 * 16, "3": 24 * 16 * 9 * 16, "7": 160}


def test_a_student_is_traced_and_costs_what_it_is(runner):
    recipe = Recipe((Student(factory="small"),))
    assert [layer.name for layer in runner.structure.of(recipe).layers] == ["0", "3", "7"]
    assert cost.macs(runner.structure, recipe) == sum(MACS.values())
    half = Recipe((Student(factory="small"), Prune("0", 8)))
    assert cost.macs(runner.structure, half) == MACS["0"] // 3 + MACS["3"] // 3 + MACS["7"]
    packed = 3 * 24 * 9 * 4 / 8 + 24 * 4 + 24 * 4  # four bits, scales, the folded biases
    four = Recipe((Student(factory="small"), Quantize("0", 4)))
    dense = cost.layer_bytes(runner.structure, recipe) - cost.layer_bytes(runner.structure, four)
    assert dense == (3 * 24 * 9 * 4 + 24 * 4) - packed


def test_it_is_compressed_trained_exported_and_measured(runner):
    runner.baseline()
    recipe = Recipe(
        (
            Student(factory="small"),
            Prune("0", 16),
            Sparsify("3", 0.5),
            Quantize("3", 4, 8),
            Quantize("7", 8),
            Recover("finetune", 12, 0.1),
        )
    )
    measured = runner.run(recipe).metrics
    data = runner.path(recipe).read_bytes()
    assert measured["size_bytes"].value == len(data) < 0.5 * len(runner.build(Recipe()))
    assert measured["macs"].value == 2 * MACS["0"] // 3 + 2 * MACS["3"] // 3 + MACS["7"]
    untrained = runner.scores(runner.build(Recipe((*recipe.steps[:-1], Recover("batchnorm"))))).mean()
    assert measured["accuracy"].value > untrained + 0.1, "the teacher taught it nothing"
    shapes = {tuple(entry.dims) for entry in packing.unpack(data).graph.initializer}
    assert (16, 16, 3, 3) in shapes
    onnx.checker.check_model(packing.unpack(data))


@pytest.mark.parametrize("recovery", [(), (Recover("batchnorm"),), (Recover("statistics"),)])
def test_untrained_it_computes_what_the_student_does(recovery, runner):
    """Up to statistics; those of an untouched student are its own, whatever the network has under the same names."""
    recipe = Recipe((Student(factory="small"), *recovery))
    found = runner.scores(runner.build(recipe))
    with torch.no_grad():
        student = runner.builder.network(recipe)
        expected = [float(answer) for x, y in runner.validation() for answer in (student(x).argmax(1) == y).float()]
    if not recovery:
        assert found.tolist() == expected
    torch.manual_seed(99)
    again = LocalRunner(runner.task, runner.files.directory, MeasurementSettings(calibration_images=64))
    assert again.build(recipe) == runner.build(recipe), "its random weights are not drawn from the seed"


def test_moments_are_the_students_own(network, task_of, tmp_path):
    """A student that is the network itself, under the same names but with other weights, is left as it is."""
    model, x = network("gated")

    def other():
        made = type(model)()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(0.5)
        return made

    runner = LocalRunner(
        task_of(model, x, students={"other": other}), tmp_path, MeasurementSettings(calibration_images=64)
    )
    plain_file, corrected = (
        runner.build(Recipe((Student(factory="other"), *r))) for r in ((), (Recover("statistics"),))
    )
    one, two = (
        sorted(
            onnx.numpy_helper.to_array(entry).std()
            for entry in packing.unpack(data).graph.initializer
            if len(entry.dims) == 4
        )
        for data in (plain_file, corrected)
    )
    assert one == pytest.approx(two, rel=1e-3)


def test_steps_refer_to_the_students_layers(runner):
    for step in (Quantize("stem", 4), Prune("layer1.0.conv1", 8)):
        with pytest.raises(RecipeError, match=r"layers here: 0, 3, 7"):
            runner.build(Recipe((Student(factory="small"), step)))
    with pytest.raises(RecipeError, match="no layer '3'"):
        runner.build(Recipe((Quantize("3", 4),)))


def test_a_student_that_the_task_does_not_make_is_refused(runner):
    with pytest.raises(RecipeError, match=r"student 'large': the task makes no such network; .* it makes: small"):
        runner.build(Recipe((Student(factory="large"),)))


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 9)), r"returns the shape \(2, 9\), the network \(2, 10\)"),
        (lambda: nn.Linear(7, 10), "does not run on the task's inputs"),
        (lambda: 3, "the function of its student 'bad' returned int"),
        (lambda: nowhere, "the function of its student 'bad' failed: NameError"),  # noqa: F821
        (small(), r"write a name \(letters, .*\) and a function"),
    ],
)
def test_a_student_of_no_use_is_refused(factory, complaint, network, task_of, tmp_path):
    model, x = network("residual")
    with pytest.raises(TaskError, match=complaint):
        LocalRunner(task_of(model, x, students={"bad": factory}), tmp_path, MeasurementSettings(calibration_images=16))


def test_recipes_and_networks_without_such_students_are_written_as_before(runner):
    assert Recipe((Student(("layer1.0",)),)).to_dict()["steps"] == [{"step": "student", "drop": ("layer1.0",)}]
    recipe = Recipe((Student(factory="small"), Quantize("0", 4)))
    assert Recipe.from_dict(json.loads(recipe.to_json())) == recipe
    assert recipe.describe() == "student small, weights 4 bit"
    alone = replace(runner.structure, students=())
    old = {name: value for name, value in asdict(alone).items() if name not in ("students", "student")}
    old["groups"] = [{name: group[name] for name in ("name", "channels", "round_to")} for group in old["groups"]]
    assert old["groups"]
    assert json.dumps(plain(alone), sort_keys=True) == json.dumps(old, sort_keys=True)
