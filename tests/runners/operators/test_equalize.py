"""Cross-layer equalisation: the network computes what it did, ranges are alike, and a network of uneven channels is won
back.
"""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from paretorch.errors import ConfigError, RecipeError
from paretorch.runners.compression.calibration import Calibration
from paretorch.runners.compression.compress import compress
from paretorch.runners.compression.trace import trace
from paretorch.runners.local import LocalRunner
from paretorch.runners.operators.equalize import Pair, channel_peaks, equalizing_scales, find_pairs, scale_channels
from paretorch.runners.operators.fold import fold_batchnorms
from paretorch.runners.operators.moments import match_moments, output_moments
from paretorch.runners.settings import MeasurementSettings
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.rules import Rule
from paretorch.spaces.space import Space
from paretorch.spaces.techniques.cluster import Cluster
from paretorch.spaces.techniques.equalize import EQUALIZATIONS, Equalize
from paretorch.spaces.techniques.lowrank import LowRank
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover
from paretorch.spaces.techniques.sparsify import Sparsify
from paretorch.spaces.techniques.student import Student

ACTIVATIONS = (nn.ReLU, lambda: nn.LeakyReLU(0.2), nn.PReLU, nn.Identity)


@st.composite
def chains(draw):
    """A convolutional network of 2 or 3 layers and a classifier, with what may lie between."""
    torch.manual_seed(draw(st.integers(0, 1 << 16)))
    modules, channels = [], 3
    for number in range(draw(st.integers(2, 3))):
        groups = draw(st.sampled_from((1, 2, channels))) if number else 1
        width = channels * draw(st.integers(1, 2)) if groups > 1 else draw(st.sampled_from((4, 8)))
        modules.append(nn.Conv2d(channels, width, 3, padding=1, groups=groups, bias=draw(st.booleans())))
        channels = width
        if draw(st.booleans()):
            modules.append(nn.BatchNorm2d(channels))
        modules.append(draw(st.sampled_from(ACTIVATIONS))())
        if draw(st.booleans()):
            modules.append(draw(st.sampled_from((nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Dropout(0.3)))))
    pool = draw(st.sampled_from((nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((2, 1)))))
    side = 1 if pool.output_size == 1 else 2
    hidden = [nn.Linear(channels * side, 6), nn.ReLU()] if draw(st.booleans()) else []
    return nn.Sequential(*modules, pool, nn.Flatten(), *hidden, nn.Linear(6 if hidden else channels * side, 5))


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(model=chains(), data=st.data())
def test_what_is_computed_stays(model, data, settle):
    """For any factors, and for those that equalise; every layer but the last is in a pair."""
    model, x = settle(model, (3, 8, 8), n=8)
    pairs, reasons = find_pairs(model, x[:2])
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert [pair.maker for pair in pairs] == layers[:-1]
    assert list(reasons) == layers[-1:]
    expected = model(x).detach()
    scaled = copy.deepcopy(model)
    for pair in pairs:
        scale_channels(scaled, pair, 10 ** (2 * torch.rand(len(model.get_submodule(pair.maker).weight)) - 1))
    torch.testing.assert_close(scaled(x).detach(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    peaks = data.draw(st.sampled_from((None, channel_peaks(model, pairs, [x]))))
    for pair, scales in zip(pairs, equalizing_scales(model, pairs, peaks), strict=True):
        scale_channels(model, pair, scales)
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_two_layers_are_equalised_as_in_the_paper():
    """s = sqrt(r1 r2) / r2 (equation 11), after which the ranges of each channel are equal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    r1, r2 = model[0].weight.abs().amax((1, 2, 3)), model[2].weight.abs().amax((0, 2, 3))
    (pair,), _ = find_pairs(model, torch.randn(2, 3, 8, 8))
    assert pair == Pair("0", ("2",))
    (scales,) = equalizing_scales(model, [pair])
    torch.testing.assert_close(scales, (r1 * r2).sqrt() / r2)
    scale_channels(model, pair, scales)
    torch.testing.assert_close(model[0].weight.abs().amax((1, 2, 3)), model[2].weight.abs().amax((0, 2, 3)))


def test_three_layers_with_a_depthwise_one_between_meet_in_the_middle():
    """All three ranges of a channel become their geometric mean, which is what the pair-wise rule converges to."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    ranges = [
        model[0].weight.abs().amax((1, 2, 3)),
        model[2].weight.abs().amax((1, 2, 3)),
        model[4].weight.abs().amax((0, 2, 3)),
    ]
    pairs, _ = find_pairs(model, torch.randn(2, 3, 8, 8))
    for pair, scales in zip(pairs, equalizing_scales(model, pairs), strict=True):
        scale_channels(model, pair, scales)
    mean = torch.stack(ranges).log().mean(0).exp()
    for found in (
        model[0].weight.abs().amax((1, 2, 3)),
        model[2].weight.abs().amax((1, 2, 3)),
        model[4].weight.abs().amax((0, 2, 3)),
    ):
        torch.testing.assert_close(found, mean, rtol=5e-3, atol=0)


def test_values_and_weights_become_alike(network):
    """By activations the quotient of a channel's largest value and largest weight becomes the same for all channels."""
    model, x = network("sound")
    fold_batchnorms(model, (("0", "1"), ("4", "5")))
    pairs, _ = find_pairs(model, x[:2])
    for pair, scales in zip(pairs, equalizing_scales(model, pairs, channel_peaks(model, pairs, [x])), strict=True):
        scale_channels(model, pair, scales)
    for pair, peaks in zip(pairs, channel_peaks(model, pairs, [x]), strict=True):
        weight = model.get_submodule(pair.readers[0]).weight
        quotient = peaks / weight.abs().flatten(2).amax(2).amax(0) if weight.ndim > 2 else peaks / weight.abs().amax(0)
        torch.testing.assert_close(quotient, quotient.mean().expand_as(quotient), rtol=5e-3, atol=0)


def test_dead_channels_get_the_range_of_others():
    """A channel that is never active or never read must not decide on the scale of the weight at its other end."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].weight.data[0], model[0].bias.data[0], model[2].weight.data[:, 1] = 1e-30, 1e-30, 0
    pairs, _ = find_pairs(model, torch.randn(2, 4))
    for peaks in (None, channel_peaks(model, pairs, [torch.randn(16, 4)])):
        (scales,) = equalizing_scales(model, pairs, peaks)
        assert scales.isfinite().all()
        found = copy.deepcopy(model)
        scale_channels(found, *pairs, scales)
        columns = found[2].weight.detach().abs().amax(0)
        assert columns[0] == pytest.approx(columns[2])
        if peaks is None:
            assert found[0].weight.detach().abs().amax(1)[1] == pytest.approx(columns[2])


class Unusual(nn.Module):
    """What hooks alone would miss: functions, tensors that are read twice, weights that are used otherwise."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.twice, self.d, self.e = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.f, self.g, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = self.b(x).relu_() + self.c(x)  # a is read by b and c, and b and c by the sum
        x = F.relu(self.twice(F.relu(self.twice(x))))
        y = self.d(x)
        x = F.relu6(y) + 0 * y.mean()
        x = self.f(F.relu(self.e(x)))
        return self.last(F.relu(F.linear(x, self.g.weight / self.g.weight.norm())))


def test_only_what_has_no_other_reader_is_a_pair():
    torch.manual_seed(0)
    pairs, reasons = find_pairs(Unusual().eval(), torch.randn(4, 8))
    assert pairs == [Pair("a", ("b", "c")), Pair("e", ("f",))]
    assert reasons == {
        "b": "add reads them",
        "c": "add reads them",
        "d": "relu6 reads them",
        "f": "linear reads them",
        "last": "its outputs are the network's, or are read by what cannot be seen",
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_cannot_be_seen_is_found_out():
    """A scripted module runs outside of Python."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.extra = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Sigmoid()))

        def forward(self, x):
            y = F.relu(self.a(x))
            return self.b(y) + self.extra(y)

    torch.manual_seed(0)
    pairs, reasons = find_pairs(Hidden().eval(), torch.randn(4, 8))
    assert pairs == []
    assert "a" in reasons


@pytest.mark.parametrize("name", ["mobile", "gated"])
def test_relu6_and_sigmoids_are_left_alone(name, network):
    model, x = network(name)
    structure = trace(model, x[:4])
    assert structure.pairs == ()
    with pytest.raises(RecipeError, match=r"equalize: no layer's outputs reach only other layers.*(ReLU6|silu)"):
        compress(copy.deepcopy(model), Recipe((Equalize(),)), structure, x[:2])
    with pytest.raises(ConfigError, match="equalize: no layer's outputs reach only other layers"):
        Space(weight_bits=(Rule((4, 8)),), equalize=("none", "weights")).axes(structure)


def test_sums_are_left_alone(network):
    model, x = network("residual")
    inner = ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1")
    assert trace(model, x[:4]).pairs == tuple((name, (name.replace("conv1", "conv2"),)) for name in inner)


def uneven(model, x, decades=1.0):
    """The same network, its channels' ranges made uneven: rows times 10^U(-decades, decades), columns by the
    inverse.
    """
    torch.manual_seed(2)
    for pair in find_pairs(model, x[:2])[0]:
        count = len(model.get_submodule(pair.maker).weight)
        scale_channels(model, pair, 10 ** (decades * (2 * torch.rand(count) - 1)))
    return model


def plain():
    """A network without BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


@pytest.mark.parametrize("by", EQUALIZATIONS)
@pytest.mark.parametrize(("bits", "activations"), [(4, 32), (8, 8)])
def test_uneven_channels_are_won_back(by, bits, activations, task_of, tmp_path):
    """Of the files' outputs: what few bits and one range for all channels lose is, equalised, what the even network
    loses so.
    """
    torch.manual_seed(0)
    even, x = plain().eval(), torch.randn(128, 3, 8, 8)
    expected = even(x).detach()
    steps = tuple(Quantize(name, bits, activations) for name in ("0", "2", "5", "9"))

    def error(model, *first):
        runner = LocalRunner(task_of(model, x), tmp_path, MeasurementSettings(calibration_images=64))
        outputs = runner.outputs(runner.build(Recipe((*first, *steps))))
        return float((outputs - expected).norm() / expected.norm())

    model = uneven(copy.deepcopy(even), x)
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-4, atol=1e-5)
    before, after = error(model), error(model, Equalize(by))
    assert before > 2 * after
    assert after == pytest.approx(error(even, Equalize(by)), rel=0.05)


def test_moments_are_put_right_in_the_equalised_network(task_of, tmp_path):
    """Bias correction must neither undo the factors nor take them for an effect of rounding."""
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8)
    model = uneven(plain().eval(), x)
    expected = output_moments(model, [x])
    found = compress(copy.deepcopy(model), Recipe((Equalize(),)), trace(model, x), x[:2])
    assert not torch.allclose(found[0].weight, model[0].weight, rtol=0.5)
    weights = {name: value.clone() for name, value in found.state_dict().items()}
    factors = match_moments(found, [x], expected)
    assert sorted(factors) == ["0", "2", "5", "9"]
    for name, factor in factors.items():
        torch.testing.assert_close(factor, torch.ones_like(factor), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            found.state_dict()[f"{name}.weight"], weights[f"{name}.weight"], rtol=1e-3, atol=1e-6
        )


def recipes_beside(structure):
    """`Equalize` beside every other kind of step."""
    names = [layer.name for layer in structure.layers]
    group = structure.groups[-1]
    return {
        "float16": (Quantize(names[1], 16),),
        "fewer channels": (Prune(group.name, group.round_to), Quantize(names[1], 8, 8)),
        "low rank": (LowRank(names[1], 2), Quantize(names[1], 8, 8)),
        "zeros by obs": (Sparsify(names[1], 0.5, "obs"),),
        "gptq": (Quantize(names[1], 4, 32, "gptq"), Quantize(names[2], 4, 32, "adaround")),
        "codebooks": (Cluster(names[1], 4),),
        "statistics": (*(Quantize(name, 4, 8) for name in names), Recover("statistics")),
        "training": (*(Quantize(name, 3, 8) for name in names), Recover("finetune", 0.5)),
        "without a block": (Student(structure.blocks[:1]), Quantize(names[0], 8, 8)),
    }


def test_it_composes_with_every_step(network, task_of, tmp_path):
    """The files are others than without it, of about the same size, and answer about the same; again they are the
    same.
    """
    model, x = network("residual")
    runner = LocalRunner(task_of(model, x), tmp_path, MeasurementSettings(calibration_images=64))
    for number, (what, steps) in enumerate(recipes_beside(runner.structure).items()):
        recipe = Recipe((Equalize(EQUALIZATIONS[number % 2]), *steps))
        plain_file, data = runner.build(Recipe(steps)), runner.build(recipe)
        assert number > 2 or runner.build(recipe) == data, what
        assert data != plain_file, what
        assert abs(len(data) - len(plain_file)) <= 0.02 * len(data), what
        one, other = runner.outputs(plain_file), runner.outputs(data)
        assert float((one - other).norm() / one.norm()) < 0.35, what


def test_statistics_are_those_of_the_equalised_network(network):
    """GPTQ and OBS ask for the inputs that a layer is given after equalisation; without any other step BatchNorm
    stays.
    """
    model, x = network("residual")
    structure = trace(model, x[:4])
    calibration = Calibration(model, [x[:64]])
    recipe = Recipe((Equalize(), Quantize("layer1.0.conv2", 3, 32, "gptq")))
    found = compress(copy.deepcopy(model), recipe, structure, x[:2], None, calibration)
    equalised = compress(copy.deepcopy(model), Recipe((Equalize(),)), structure, x[:2])
    own = Calibration(equalised, [x[:64]])
    expected = compress(copy.deepcopy(equalised), Recipe(recipe.steps[1:]), structure, x[:2], None, own)
    assert torch.equal(found.layer1[0].conv2.weight, expected.layer1[0].conv2.weight)


def test_by_activations_needs_images(network):
    model, x = network("residual")
    with pytest.raises(ValueError, match="give compress\\(\\) a calibration"):
        compress(copy.deepcopy(model), Recipe((Equalize("activations"),)), trace(model, x[:4]), x[:2])
