"""What the calibration images say of layers: against hooks and loops, from the disk as from the network, and in
builds.
"""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paretorch.errors import Diverged, RecipeError, TaskError
from paretorch.runners.compression import calibration as module
from paretorch.runners.compression.calibration import Calibration
from paretorch.runners.compression.compress import compress
from paretorch.runners.compression.freeze import freeze
from paretorch.runners.compression.library import LayerLibrary, Method, compress_layer
from paretorch.runners.compression.trace import trace
from paretorch.runners.files.packing import unpack
from paretorch.runners.local import LocalRunner
from paretorch.runners.operators.hessian import gram
from paretorch.runners.operators.quantize import codes
from paretorch.runners.settings import MeasurementSettings
from paretorch.search.support import check_criteria
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.rules import Rule
from paretorch.spaces.space import Space
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.sparsify import Sparsify
from paretorch.spaces.techniques.student import Student


def hessians(model, x):
    found = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)}
    hooks = [
        m.register_forward_pre_hook(lambda m, a, n=n: found.update({n: gram(m, a[0]).float()}))
        for n, m in layers.items()
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture
def passes(monkeypatch):
    """How often a network was run over its images."""
    calls = []
    for name in ("_hessians", "_fisher"):
        real = getattr(module.Statistics, name)
        monkeypatch.setattr(
            module.Statistics, name, lambda self, names, real=real, name=name: calls.append(name) or real(self, names)
        )
    return calls


@pytest.mark.parametrize("name", ["residual", "mobile", "sound", "tokens"])
def test_hessians_of_all_layers_come_from_one_pass_and_stay_on_disk(name, network, tmp_path, passes):
    model, x = network(name)
    expected = hessians(model, x[:50])
    for _ in range(2):
        found = Calibration(model, x[:50].split(16), LayerLibrary(tmp_path)).untouched
        for layer, hessian in expected.items():
            torch.testing.assert_close(found[layer].hessian(), hessian, rtol=1e-4, atol=1e-4 * float(hessian.max()))
    assert passes == ["_hessians"]
    without = Calibration(model, x[:50].split(16)).untouched
    assert all(torch.equal(without[layer].hessian(), found[layer].hessian()) for layer in expected)


def test_few_fit_into_memory_and_all_are_found(network, monkeypatch, passes):
    model, x = network("residual")
    monkeypatch.setattr(module, "_MEMORY", 8 * 144 * 144)
    expected = hessians(model, x[:32])
    found = Calibration(model, x[:32].split(32)).untouched
    for layer, hessian in expected.items():
        assert torch.equal(found[layer].hessian(), hessian)
    assert 1 < len(passes) <= len(expected)


def test_the_name_holds_all_that_the_numbers_depend_on(network):
    model, x = network("residual")
    parts = x[:32].split(16)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.fc.bias[0] += 1
    keys = [
        Calibration(m, p, seed=s).untouched.key
        for m, p, s in ((model, parts, 0), (other, parts, 0), (model, parts[:1], 0), (model, parts, 1))
    ]
    assert len(set(keys)) == 4
    assert Calibration(copy.deepcopy(model), x[:32].split(16)).untouched.key == keys[0]


def test_the_gradients_are_those_of_the_distance_from_the_own_outputs(network):
    """Fisher information by its definition: over all classes, image by image."""
    model, x = network("perceptron")
    torch.manual_seed(0)
    images = x[torch.randint(256, (8,))]
    weight = model[-1].weight
    expected = torch.zeros_like(weight)
    for image in images:
        outputs = model(image[None])
        for c, p in enumerate(outputs.detach().softmax(1)[0]):
            (gradient,) = torch.autograd.grad(F.cross_entropy(outputs, torch.tensor([c])), weight, retain_graph=True)
            expected += p * gradient.square() / len(images)
    many = images.repeat(400, *[1] * (x.ndim - 1))  # draws enough that their mean is near
    found = Calibration(model, many.split(32)).untouched["7"].fisher()
    error = float((found - expected).norm() / expected.norm())
    assert error < 0.1
    assert not any(p.grad is not None for p in model.parameters())


METHODS = {
    "gptq": (Quantize("layer1.0.conv1", 3, 8, "gptq"),),
    "adaround": (Quantize("fc", 2, 32, "adaround"),),
    "wanda": (Sparsify("layer1.0.conv1", 0.5, "activation"),),
    "taylor": (Sparsify("fc", 0.5, "taylor"), Quantize("fc", 4)),
    "obs": (Sparsify("layer1.0.conv1", 0.7, "obs"),),
    "random": (Sparsify("down", 0.5, "random"),),
    "pattern": (Sparsify("down", 0.5, "magnitude", "2:4"), Quantize("down", 3)),
    "both": (Sparsify("layer1.0.conv1", 0.5, "obs", "2:4"), Quantize("layer1.0.conv1", 3, 8, "gptq", "minmax")),
}


@pytest.mark.parametrize("name", METHODS)
def test_builds_are_the_same_with_the_library_and_without(name, network, task_of, tmp_path):
    model, x = network("residual")
    runner = LocalRunner(
        task_of(model, x),
        tmp_path,
        MeasurementSettings(calibration_images=64),
        library=LayerLibrary(tmp_path / "library"),
    )
    recipe = Recipe((*METHODS[name], Recover("batchnorm")))
    built = [runner.build(recipe), runner.build(recipe)]
    other = LocalRunner(
        task_of(model, x),
        tmp_path,
        MeasurementSettings(calibration_images=64),
        library=LayerLibrary(tmp_path / "library"),
    )
    built.append(other.build(recipe))
    apart = LocalRunner(
        task_of(model, x), tmp_path, MeasurementSettings(calibration_images=64), library=LayerLibrary(limit=0)
    )
    built.append(apart.build(recipe))
    assert built == [built[0]] * 4
    plain = {"gptq": "nearest", "adaround": "nearest"}.get(name)
    if plain:
        assert built[0] != runner.build(
            Recipe(
                (
                    Quantize(*(METHODS[name][0].layer, 3 if name == "gptq" else 2, 8 if name == "gptq" else 32)),
                    Recover("batchnorm"),
                )
            )
        )


@pytest.mark.parametrize("name", ["gptq", "adaround", "both"])
def test_what_ships_is_what_was_rounded(name, network):
    model, x = network("residual")
    structure = trace(model, x)
    recipe = Recipe(METHODS[name])
    step = recipe.of(Quantize)[0]
    calibration = Calibration(model, x[:64].split(32))
    sparse = recipe.of(Sparsify)
    method = Method(
        *((sparse[0].criterion, sparse[0].pattern) if sparse else ("magnitude", "")), step.rounding, step.ranges
    )
    weight = model.get_submodule(step.layer).weight.detach()
    made = compress_layer(weight, step.weight_bits, 0.5 if sparse else 0.0, method, calibration.untouched[step.layer])
    near = codes(weight if made.mask is None else weight * made.mask, made.scale, step.weight_bits)
    other = copy.deepcopy(model)
    frozen = freeze(compress(other, recipe, structure, x[:2], None, calibration), recipe)[step.layer]
    shape = (-1, *[1] * (weight.ndim - 1))
    assert torch.equal(frozen.codes * frozen.scale.view(shape), made.weight)
    assert torch.equal(other.get_submodule(step.layer).weight, made.weight)
    assert not torch.equal(frozen.codes, near)


@pytest.mark.parametrize("steps", [(Prune("down", 16),), (Student(("layer1.0",)),)])
def test_a_network_that_was_cut_down_is_calibrated_anew(steps, network):
    """Its layers have other inputs, and other shapes."""
    model, x = network("residual")
    structure = trace(model, x)
    calibration = Calibration(model, x[:64].split(32))
    layer = "layer2.0.conv1"
    cut = compress(copy.deepcopy(model), Recipe(steps), structure, x[:2])
    found = compress(
        copy.deepcopy(model), Recipe((*steps, Quantize(layer, 3, 32, "gptq"))), structure, x[:2], None, calibration
    )
    weight = cut.get_submodule(layer).weight.detach()
    assert found.get_submodule(layer).weight.shape == weight.shape
    expected = compress_layer(weight, 3, 0.0, Method(rounding="gptq"), calibration.after(cut)[layer]).weight
    torch.testing.assert_close(found.get_submodule(layer).weight, expected)
    if isinstance(steps[0], Student):
        dense = compress_layer(weight, 3, 0.0, Method(rounding="gptq"), calibration.untouched[layer]).weight
        assert not torch.equal(dense, expected)


def test_training_goes_on_from_what_was_adjusted(network, task_of, tmp_path):
    model, x = network("residual")
    runner = LocalRunner(
        task_of(model, x), tmp_path, MeasurementSettings(calibration_images=64), library=LayerLibrary(limit=0)
    )
    near, ours = (
        runner.build(Recipe((Quantize("layer1.0.conv1", 2, 32, rounding), Recover("finetune", 1.0, 1e-9))))
        for rounding in ("nearest", "gptq")
    )
    still = runner.build(Recipe((Quantize("layer1.0.conv1", 2, 32, "gptq"), Recover("batchnorm"))))

    def shipped(data):
        return next(t for t in unpack(data).graph.initializer if t.name == "layer1.0.conv1.weight_q").raw_data

    assert shipped(ours) == shipped(still)
    assert shipped(ours) != shipped(near)


def test_inputs_that_are_not_finite_are_a_result(network):
    model, x = network("residual")
    with torch.no_grad():
        model.bn.weight *= 1e30
    structure = trace(network("residual")[0], x)
    calibration = Calibration(model, x[:64].split(32))
    with pytest.raises(Diverged, match=r"layer 'layer1.0.conv1' is given NaN or infinity"):
        compress(model, Recipe((Quantize("fc", 3, 32, "gptq"),)), structure, x[:2], None, calibration)


def test_without_calibration_nothing_is_guessed(network):
    model, x = network("residual")
    with pytest.raises(ValueError, match="hessian"):
        compress(copy.deepcopy(model), Recipe((Quantize("fc", 3, 32, "gptq"),)), trace(model, x), x[:2])


def test_what_a_layer_cannot_have_is_refused(network, task_of, tmp_path):
    wide = nn.Sequential(nn.Flatten(), nn.Linear(9000, 10))
    structure = trace(wide, torch.randn(4, 9000))
    with pytest.raises(
        RecipeError, match=r"layer '1': rounding gptq needs a Hessian of 9000 x 9000 inputs, more than 8192"
    ):
        compress(wide, Recipe((Quantize("1", 3, 32, "gptq"),)), structure, torch.randn(2, 9000))
    model, x = network("mobile")
    structure = trace(model, x)
    depthwise = next(layer.name for layer in structure.layers if layer.kind == "depthwise")
    with pytest.raises(RecipeError, match="pattern 2:4 needs 4 input channels of one group, it has 1"):
        compress(model, Recipe((Sparsify(depthwise, 0.5, "magnitude", "2:4"),)), structure, x[:2])


def test_depthwise_layers_are_rounded_for_their_own_inputs(network, task_of, tmp_path):
    """A whole network of all kinds of layers, each method in turn, and the outputs are nearer than with nearest
    rounding.
    """
    model, x = network("mobile")
    structure = trace(model, x)
    calibration = Calibration(model, x.split(32))
    errors = {}
    with torch.no_grad():
        dense = model(x)
        for rounding in ("nearest", "gptq", "adaround"):
            recipe = Recipe(tuple(Quantize(layer.name, 3, 32, rounding) for layer in structure.layers))
            found = compress(copy.deepcopy(model), recipe, structure, x[:2], None, calibration)
            freeze(found, recipe)
            errors[rounding] = float((found(x) - dense).square().mean())
    assert errors["gptq"] < 0.8 * errors["nearest"]
    assert errors["adaround"] < 0.8 * errors["nearest"]


def test_criteria_rank_as_they_should(network):
    """On a network whose inputs differ in size, what knows of the inputs does better than magnitude, and all better
    than chance.
    """
    model, x = network("perceptron")
    x = x * torch.linspace(0.1, 3, x[0].numel()).view(1, *x.shape[1:])
    structure = trace(model, x)
    calibration = Calibration(model, x.split(32))
    errors = {}
    with torch.no_grad():
        dense = model(x)
        for criterion in ("magnitude", "taylor", "activation", "obs", "random"):
            recipe = Recipe(tuple(Sparsify(layer.name, 0.6, criterion) for layer in structure.layers))
            found = compress(copy.deepcopy(model), recipe, structure, x[:2], None, calibration)
            errors[criterion] = float((found(x) - dense).square().mean())
    assert max(errors[name] for name in errors if name != "random") < errors["random"]
    assert errors["taylor"] < errors["magnitude"]
    assert errors["obs"] == min(errors.values())


def test_the_draw_depends_on_the_seed_and_the_layer_alone(network):
    model, x = network("residual")
    made = [
        compress_layer(
            model.get_submodule(layer).weight,
            32,
            0.5,
            Method("random"),
            Calibration(model, x[:n].split(16), seed=seed).untouched[layer],
        )
        for layer, n, seed in (
            ("layer1.0.conv1", 32, 0),
            ("layer1.0.conv1", 16, 0),
            ("layer1.0.conv1", 32, 1),
            ("layer1.1.conv1", 32, 0),
        )
    ]
    assert torch.equal(made[0].mask, made[1].mask)
    for one, two in itertools.combinations((made[0], made[2], made[3]), 2):
        assert 0.3 < float(np.mean(one.mask.numpy() == two.mask.numpy())) < 0.7


def keep_early(weight, norms):
    """The later in the layer, the less important."""
    return -torch.arange(weight.numel(), dtype=torch.float32).view(weight.shape)


@pytest.mark.parametrize(("ratio", "pattern"), [(0.3, ""), (0.5, "2:4")])
def test_a_function_of_the_users_chooses_the_zeros(ratio, pattern, network, task_of, tmp_path):
    model, x = network("residual")
    task = task_of(model, x, criteria={"mine.py:early": keep_early})
    runner = LocalRunner(
        task, tmp_path, MeasurementSettings(calibration_images=64), library=LayerLibrary(tmp_path / "library")
    )
    recipe = Recipe((Sparsify("down", ratio, "mine.py:early", pattern), Recover("batchnorm")))
    found = compress(
        copy.deepcopy(runner.builder.model),
        recipe,
        runner.structure,
        runner.builder.example,
        runner.builder.library,
        runner.builder.statistics,
    )
    mask = found.down.parametrizations["weight"][0].mask
    if pattern:
        assert (mask.view(len(mask), -1, 4, 3, 3) == torch.tensor([1.0, 1, 0, 0]).view(4, 1, 1)).all()
    else:
        count = round(ratio * mask.numel())
        assert mask.flatten().tolist() == [1.0] * (mask.numel() - count) + [0.0] * count
    assert runner.build(recipe) == runner.build(recipe)


def test_it_is_given_the_norms_of_the_inputs(network, task_of, tmp_path):
    """With the product of Wanda it is Wanda, for convolutions of each kind and linear layers."""
    model, x = network("mobile")
    task = task_of(model, x, criteria={"mine.py:wanda": lambda weight, norms: weight.abs() * norms})
    runner = LocalRunner(task, tmp_path, MeasurementSettings(calibration_images=64), library=LayerLibrary(limit=0))
    for layer in runner.structure.layers:
        own, ours = (
            runner.build(Recipe((Sparsify(layer.name, 0.5, criterion), Quantize(layer.name, 4))))
            for criterion in ("mine.py:wanda", "activation")
        )
        assert own == ours, layer.name
    assert {layer.kind for layer in runner.structure.layers} == {"conv", "depthwise", "linear"}


def test_a_function_that_was_edited_is_asked_again(network, task_of, tmp_path):
    """Under the same name: nothing of it may come from the cache."""
    model, x = network("residual")
    recipe = Recipe((Sparsify("down", 0.5, "mine.py:score"),))
    built = []
    for function in (keep_early, lambda weight, norms: -keep_early(weight, norms)):
        task = task_of(model, x, criteria={"mine.py:score": function})
        built.append(
            LocalRunner(
                task, tmp_path, MeasurementSettings(calibration_images=64), library=LayerLibrary(tmp_path / "l")
            ).build(recipe)
        )
    assert built[0] != built[1]


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (lambda weight, norms: weight.sum(), r"returned the shape \(\) for a weight of shape \(32, 16, 3, 3\)"),
        (lambda weight, norms: None, "returned NoneType"),
        (lambda weight, norms: weight / 0, "a finite score for each weight"),
        (lambda weight, norms: weight.nothing(), "failed for a weight of shape .* AttributeError"),
    ],
)
def test_a_function_that_gives_no_scores_is_told(function, complaint, network, task_of, tmp_path):
    model, x = network("residual")
    runner = LocalRunner(
        task_of(model, x, criteria={"a.py:f": function}), tmp_path, MeasurementSettings(calibration_images=64)
    )
    with pytest.raises(TaskError, match=complaint):
        runner.build(Recipe((Sparsify("down", 0.5, "a.py:f"),)))


def test_it_cannot_change_the_weights(network, task_of, tmp_path):
    def vandal(weight, norms):
        return weight.zero_().abs()

    model, x = network("residual")
    runner = LocalRunner(
        task_of(model, x, criteria={"a.py:f": vandal}), tmp_path, MeasurementSettings(calibration_images=64)
    )
    recipe = Recipe((Sparsify("down", 0.5, "a.py:f"),))
    found = compress(
        copy.deepcopy(model), recipe, runner.structure, runner.builder.example, None, runner.builder.statistics
    )
    assert int(found.down.weight.count_nonzero()) == found.down.weight.numel() // 2


def test_a_criterion_that_the_task_has_not_is_refused(network, task_of, tmp_path):
    model, x = network("residual")
    runner = LocalRunner(
        task_of(model, x, criteria={"a.py:f": keep_early}), tmp_path, MeasurementSettings(calibration_images=64)
    )
    with pytest.raises(RecipeError, match=r"'a.py:g': the task has no such function; .* functions of the task: a.py:f"):
        runner.build(Recipe((Sparsify("down", 0.5, "a.py:g"),)))
    with pytest.raises(TaskError, match="write a function of"):
        task_of(model, x, criteria={"magnitude": keep_early})
    with pytest.raises(TaskError, match=r"no function for the criterion a\.py:g"):
        check_criteria(Space(criterion=(Rule(("obs", "a.py:f", "a.py:g")),)), runner.task.criteria, "t")
