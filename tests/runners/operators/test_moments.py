"""Where no BatchNorm follows, outputs get their mean and variance back, and files do not grow."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paretorch.runners.compression.compress import compress
from paretorch.runners.compression.freeze import freeze, one_factor
from paretorch.runners.compression.trace import trace
from paretorch.runners.files import packing
from paretorch.runners.local import LocalRunner
from paretorch.runners.operators.moments import match_moments, output_moments
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.targets.runtime import session
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.sparsify import Sparsify


def plain_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 16, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 12),
        nn.ReLU(),
        nn.Linear(12, 5),
    ).eval()


def statistics_of(model, x):
    """By layer the mean and the variance of each output channel, in the plainest way."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda m, a, output, name=name: found.__setitem__(name, output))
    with torch.no_grad():
        model(x)
    return {
        name: (o.transpose(0, 1).flatten(1).mean(1), o.transpose(0, 1).flatten(1).var(1, correction=0))
        for name, o in found.items()
    }


def test_with_one_batch_every_layer_has_the_moments_of_the_original():
    model, x = plain_network(), torch.randn(64, 3, 6, 6)
    recipe = Recipe(tuple(Quantize(layer.name, 3) for layer in trace(model, x).layers))
    student = compress(copy.deepcopy(model), recipe, trace(model, x), x[:2])
    freeze(student, recipe)
    match_moments(student, [x], output_moments(model, [x]))
    wanted, found = statistics_of(model, x), statistics_of(student, x)
    assert len(wanted) == 5
    for name, (mean, variance) in wanted.items():
        torch.testing.assert_close(found[name][0], mean, atol=1e-4, rtol=1e-3)
        inside = (found[name][1] / variance - 1).abs() < 1e-2  # a channel that may not grow so far is the exception
        assert inside.float().mean() > 0.8


def test_the_untouched_network_stays_as_it_is():
    model, x = plain_network(), torch.randn(64, 3, 6, 6)
    student = copy.deepcopy(model)
    parts = list(x.split(16))
    factors = match_moments(student, parts, output_moments(model, parts))
    assert all(torch.allclose(factor, torch.ones(()), atol=1e-5) for factor in factors.values())
    with torch.no_grad():
        torch.testing.assert_close(student(x), model(x), atol=1e-5, rtol=1e-4)


def test_a_layer_of_one_scale_gets_the_means_and_one_factor():
    model, x = plain_network(), torch.randn(64, 3, 6, 6)
    recipe = Recipe(tuple(Quantize(layer.name, 3, scheme="affine") for layer in trace(model, x).layers))
    student = compress(copy.deepcopy(model), recipe, trace(model, x), x[:2])
    frozen = freeze(student, recipe)
    names = one_factor(frozen, student, trace(model, x))
    assert len(names) == 5
    factors = match_moments(student, [x], output_moments(model, [x]), names)
    wanted, found = statistics_of(model, x), statistics_of(student, x)
    for name, (mean, _) in wanted.items():
        torch.testing.assert_close(found[name][0], mean, atol=1e-4, rtol=1e-3)
        assert len(factors[name].unique()) == 1
        assert float(factors[name][0]) != 1


def test_layers_that_run_twice_or_have_no_bias_or_lost_channels_are_left_alone():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

        def forward(self, x):
            return self.c(self.b(F.relu(self.a(F.relu(self.a(x))))))

    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(32, 4)
    assert [set(moments) for moments in output_moments(model, [x])] == [{"c"}]
    assert output_moments(model, [x], without={"c"}) == [{}]
    student = copy.deepcopy(model)
    student.c = nn.Linear(4, 2)
    assert match_moments(student, [x], output_moments(model, [x])) == {}


@pytest.mark.parametrize(
    "steps",
    [
        [Quantize("a", 3), Quantize("b", 3), Quantize("gate", 4), Quantize("head", 3)],
        [Quantize("a", 4, 8), Quantize("b", 4, 8), Quantize("gate", 8, 8), Quantize("head", 4, 8)],
        [Sparsify("a", 0.6), Sparsify("b", 0.6), Quantize("b", 4), Sparsify("head", 0.5)],
        [Prune("a", 16), Quantize("b", 3), Quantize("head", 16)],
    ],
)
def test_the_exported_network_is_nearer_to_the_original(steps, network, task_of, tmp_path):
    """On inputs that no moment was taken from; codes are those without correction, and the file has their size."""
    model, x = network("gated")
    runner = LocalRunner(task_of(model, x[:192]), tmp_path, MeasurementSettings(calibration_images=192))
    files = [runner.build(Recipe((*steps, *more))) for more in ((), (Recover("statistics"),))]
    assert runner.build(Recipe((*steps, Recover("statistics")))) == files[1]
    assert abs(len(files[0]) - len(files[1])) <= 64
    with torch.no_grad():
        wanted = model(x[192:]).log_softmax(1)
    graphs = [packing.unpack(data) for data in files]
    plain, corrected = (
        torch.from_numpy(session(graph).run(None, {"input": x[192:].numpy()})[0]).log_softmax(1) for graph in graphs
    )
    distances = [float(F.kl_div(found, wanted, reduction="batchmean", log_target=True)) for found in (plain, corrected)]
    assert distances[1] < 0.8 * distances[0], distances
    codes = [{t.name: t.raw_data for t in graph.graph.initializer if t.name.endswith("weight_q")} for graph in graphs]
    assert codes[0] == codes[1]


def test_a_network_of_batchnorm_alone_has_nothing_to_correct(network, task_of, tmp_path):
    model, x = network("residual")
    runner = LocalRunner(task_of(model, x), tmp_path, MeasurementSettings(calibration_images=128))
    assert set(runner.builder.output_moments[0]) == {"fc"}
