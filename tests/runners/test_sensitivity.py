"""Sensitivity: numbers that are worked out by hand, and the same numbers with recorded calls and without."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paretorch.errors import ArtifactError, ConfigError, RecipeError
from paretorch.objectives.cost import layer_bytes
from paretorch.runners import sensitivity as module
from paretorch.runners.compression.compress import chunks, compress
from paretorch.runners.compression.freeze import freeze, one_factor
from paretorch.runners.local import LocalRunner
from paretorch.runners.operators.fold import reestimate_batchnorms
from paretorch.runners.sensitivity import (
    KL,
    SQUARED,
    Prefix,
    Sensitivity,
    SensitivityRow,
    divergence,
    levels,
    measure_sensitivity,
)
from paretorch.runners.settings import MeasurementSettings
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.rules import Rule
from paretorch.spaces.space import Space
from paretorch.spaces.techniques.quantize import SCHEMES, Quantize
from paretorch.spaces.techniques.sparsify import Sparsify

SPACE = Space(weight_bits=(Rule((2, 8)),), sparsity=(Rule((0.0, 0.5)),))


# --- the number -------------------------------------------------------------------------------------------------------


def test_a_divergence_by_hand():
    """KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 ln(3/2) + 1/4 ln(1/2); of two images the mean."""
    dense = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    outputs = torch.tensor([[5.0, 5.0], [7.0, 7.0]])
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert divergence(dense, outputs) == pytest.approx(expected, rel=1e-6)
    assert divergence(outputs, dense) != pytest.approx(expected, rel=1e-3), "it is not symmetric"
    assert divergence(dense, dense) == 0.0
    assert divergence(dense, dense + 100) == pytest.approx(0, abs=1e-6), "a softmax does not see a shift"


def test_other_outputs_are_compared_by_their_variance():
    dense = torch.tensor([[1.0], [3.0]])  # variance 1
    assert divergence(dense, dense + torch.tensor([[0.5], [0.0]])) == pytest.approx(0.125)
    assert divergence(10 * dense, 10 * dense + torch.tensor([[5.0], [0.0]])) == pytest.approx(0.125), "without a unit"
    maps = torch.randn(2, 3, 4)
    assert divergence(maps, maps) == 0.0
    assert (module.unit_of(dense), module.unit_of(maps), module.unit_of(torch.zeros(2, 2))) == (SQUARED, SQUARED, KL)
    assert divergence(dense, torch.full_like(dense, math.nan)) == math.inf


# --- the levels -------------------------------------------------------------------------------------------------------


def runner_of(network, task_of, folder, name, images=64):
    model, x = network(name)
    return LocalRunner(task_of(model, x), folder, MeasurementSettings(calibration_images=images))


def test_every_combination_and_every_choice_alone(network, task_of, tmp_path):
    runner = runner_of(network, task_of, tmp_path, "perceptron")
    space = Space(
        weight_bits=(Rule((4, 8, 32)), Rule((6,), ("last",))), sparsity=(Rule((0.25, 0.5), ("first", "last")),)
    )
    assert levels(space, runner.structure) == {
        "1": [(8, 0.0), (4, 0.0), (32, 0.25), (8, 0.25), (4, 0.25), (32, 0.5), (8, 0.5), (4, 0.5)],
        "4": [(8, 0.0), (4, 0.0)],
        "7": [(6, 0.0), (32, 0.25), (6, 0.25), (32, 0.5), (6, 0.5)],
    }
    for nothing in (Space(), Space(weight_bits=(Rule((32,)),), sparsity=(Rule((0.0,)),))):
        with pytest.raises(ConfigError, match="nothing to measure"):
            levels(nothing, runner.structure)


def test_by_axis_gives_one_number_per_choice(network, task_of, tmp_path):
    runner = runner_of(network, task_of, tmp_path, "perceptron")
    space = Space(
        weight_bits=(Rule((32, 8, 4), ("1", "4"), share=True), Rule((6, 8), ("7",))),
        activation_bits=(Rule((8, 32)),),
        sparsity=(Rule((0.0, 0.5), ("7",)),),
        width=(1.0, 0.5),
    )
    found = measure_sensitivity(runner.builder, space)
    d = found.divergence
    assert found.by_axis(space, runner.structure) == {
        "weight_bits/1+4": (0.0, d("1", 8) + d("4", 8), d("1", 4) + d("4", 4)),
        "weight_bits/7": (d("7", 6), d("7", 8)),
        "sparsity/7": (0.0, d("7", 32, 0.5)),
    }
    assert d("7", 6, 0.5) > 0
    assert d("1") == 0.0
    with pytest.raises(RecipeError, match="'1' at 3 bits and 0% zeros was not measured"):
        found.by_axis(Space(weight_bits=(Rule((3,)),)), runner.structure)


def test_bytes_are_those_of_the_packed_layer(network, task_of, tmp_path):
    runner = runner_of(network, task_of, tmp_path, "perceptron")
    found = measure_sensitivity(runner.builder, SPACE)
    whole = layer_bytes(runner.structure, Recipe())
    for row in found.rows:
        steps = [Quantize(row.layer, row.weight_bits)] if row.weight_bits < 32 else []
        steps += [Sparsify(row.layer, row.sparsity)] if row.sparsity else []
        saved = whole - layer_bytes(runner.structure, Recipe(tuple(steps)))
        layer = runner.structure.layer(row.layer)
        assert row.bytes == 4 * layer.params + 4 * layer.weight_shape[0] * layer.bias - saved


# --- what is measured -------------------------------------------------------------------------------------------------


def plainly(runner, recipe):
    """The divergence of a recipe the way `LocalRunner.build` makes it, on a copy of the network."""
    dense, model = runner.builder.comparable(), runner.builder.comparable()
    compress(model, recipe, runner.structure, runner.builder.example)
    together = one_factor(freeze(model, recipe), model, runner.structure)
    parts = runner.builder.calibration_parts
    reestimate_batchnorms(model, parts, runner.builder.calibration_bias, one_factor=together)
    with torch.no_grad():
        return divergence(torch.cat([dense(p) for p in parts]), torch.cat([model(p) for p in parts]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_the_layer_alone_after_batchnorm(scheme, network, task_of, tmp_path):
    runner = runner_of(network, task_of, tmp_path, "residual", 200)  # two batches of unequal length
    before = {name: value.clone() for name, value in runner.builder.model.state_dict().items()}
    found = measure_sensitivity(runner.builder, Space(weight_bits=(Rule((2, 4, 16)),), scheme=(Rule((scheme,)),)))
    assert found.images == 200
    for layer in ("stem", "layer1.1.conv2", "fc"):
        for bits in (2, 4, 16):
            step = Quantize(layer, bits, scheme=scheme if bits < 16 else "symmetric")
            expected = plainly(runner, Recipe((step,)))
            assert found.divergence(layer, bits) == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert all(torch.equal(before[name], value) for name, value in runner.builder.model.state_dict().items())


def test_methods_are_the_first_of_the_space(network, task_of, tmp_path):
    runner = runner_of(network, task_of, tmp_path, "residual")
    rules = {"weight_bits": (Rule((2,), ("layer1.0.*", "fc")),), "sparsity": (Rule(("2:4", 0.75), ("layer1.0.*",)),)}
    plain = measure_sensitivity(runner.builder, Space(**rules))
    space = Space(
        **rules,
        rounding=(Rule(("gptq", "nearest"), share=True), Rule(("nearest",), ("fc",))),
        criterion=(Rule(("obs",)),),
    )
    for reuse in (True, False):
        found = measure_sensitivity(runner.builder, space, reuse=reuse)
        assert [(row.weight_bits, row.sparsity) for row in found.rows[:5]] == [
            (2, 0.0),
            (32, "2:4"),
            (2, "2:4"),
            (32, 0.75),
            (2, 0.75),
        ]
        assert found.divergence("fc", 2) == pytest.approx(plain.divergence("fc", 2), rel=1e-3)
        recipe = Recipe((Sparsify("layer1.0.conv1", 0.5, "obs", "2:4"), Quantize("layer1.0.conv1", 2, 32, "gptq")))
        dense, model = runner.builder.comparable(), runner.builder.comparable()
        freeze(
            compress(model, recipe, runner.structure, runner.builder.example, None, runner.builder.statistics), recipe
        )
        reestimate_batchnorms(model, runner.builder.calibration_parts, runner.builder.calibration_bias)
        with torch.no_grad():
            outputs = [torch.cat([net(part) for part in runner.builder.calibration_parts]) for net in (dense, model)]
        assert found.divergence("layer1.0.conv1", 2, "2:4") == pytest.approx(divergence(*outputs), rel=1e-3)
        mine, theirs = (sum(row.divergence for row in rows if row.layer != "fc") for rows in (found.rows, plain.rows))
        assert mine < 0.95 * theirs
    again = Sensitivity.from_json(found.to_json())
    assert again == found
    assert again.by_axis(space, runner.structure)["sparsity/layer1.0.conv1"][0] == found.divergence(
        "layer1.0.conv1", 32, "2:4"
    )


def test_without_batchnorm_statistics_the_number_is_another(network, task_of, tmp_path, monkeypatch):
    """2 bits shift the statistics of what follows; a measurement that leaves them is the wrong one."""
    runner = runner_of(network, task_of, tmp_path, "residual", 128)
    space = Space(weight_bits=(Rule((2,), ("stem",)),))
    right = measure_sensitivity(runner.builder, space).divergence("stem", 2)
    monkeypatch.setattr(module, "reestimate_batchnorms", lambda *arguments: None)
    wrong = measure_sensitivity(runner.builder, space).divergence("stem", 2)
    assert abs(wrong - right) > 0.05 * right


class Twice(nn.Module):
    """A block and a BatchNorm that run twice, once on either side of layers; tuples; changes in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.shared = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.own, self.pool, self.fc = nn.BatchNorm2d(8), nn.AdaptiveMaxPool2d(1, return_indices=True), nn.Linear(8, 5)

    def forward(self, x):
        x = self.shared(self.a(x))
        y = self.b(x)
        y += x  # in place, on what a module returned
        y = self.own(y)
        y = F.relu(y, inplace=True) + y
        y = self.shared(self.c(y))
        values, _ = self.pool(y)
        return self.fc(values.flatten(1))


class Aliased(nn.Module):
    """An input that a module changes in place and that is read afterwards."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.act, self.b, self.fc = (
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.LeakyReLU(0.3, inplace=True),
            nn.Conv2d(6, 6, 3),
            nn.Linear(6, 4),
        )
        self.drop, self.same = nn.Dropout(0.5), nn.Identity()

    def forward(self, x):
        x = self.bn(self.a(x))
        y = self.act(x)
        y = self.drop(self.b(x + self.same(y)))
        return self.fc(y.mean((2, 3)))


class Sighted(nn.Module):
    """Another way for batches that look otherwise, which two images do not show."""

    def __init__(self):
        super().__init__()
        self.a, self.odd, self.b, self.fc = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        y = self.a(x.flatten(1))
        if len(x) > 2:
            y = self.odd(y)
        return self.fc(F.relu(self.b(y)))


OWN = {"twice": (Twice, (3, 8, 8)), "aliased": (Aliased, (3, 8, 8)), "sighted": (Sighted, (3, 2, 2))}


def made(name, network, settle):
    if name not in OWN:
        return network(name)
    torch.manual_seed(0)
    kind, shape = OWN[name]
    return settle(kind(), shape)


@pytest.mark.parametrize(
    "name",
    ["residual", "mobile", "gated", "sound", "tokens", "branches", "convolutional", "twice", "aliased", "sighted"],
)
def test_recorded_calls_change_nothing(name, network, settle, task_of, tmp_path):
    model, x = made(name, network, settle)
    runner = LocalRunner(task_of(model, x), tmp_path, MeasurementSettings(calibration_images=150))
    space = Space(weight_bits=(Rule((2, 8)),))
    with_reuse, without, little = (
        measure_sensitivity(runner.builder, space, reuse=reuse, memory=memory)
        for reuse, memory in ((True, 1 << 30), (False, 1 << 30), (True, 300_000))
    )
    for found in (with_reuse, little):
        assert [(r.layer, r.weight_bits, r.bytes) for r in found.rows] == [
            (r.layer, r.weight_bits, r.bytes) for r in without.rows
        ]
        torch.testing.assert_close(
            torch.tensor([r.divergence for r in found.rows]),
            torch.tensor([r.divergence for r in without.rows]),
            rtol=1e-3,
            atol=1e-10,
        )
    assert max(r.divergence for r in without.rows) > 1e-6


def test_what_ran_before_is_not_run_again(network, task_of, tmp_path):
    runner = runner_of(network, task_of, tmp_path, "residual")
    model, counts = runner.builder.model, {}
    parts = chunks(runner.builder.calibration, 32)
    for name, part in model.named_modules():
        part.register_forward_hook(lambda m, a, r, n=name: counts.update({n: counts.get(n, 0) + 1}))
    inner = {"layer1.0.conv1", "layer1.0.bn2", "layer1.1.conv1"}
    with torch.no_grad():
        prefix = Prefix(model, parts, 1 << 30)
        prefix.advance("stem", lambda active: None)
        prefix.advance("down", lambda active: None)
        counts.clear()
        expected = [F.relu(model(part)) for part in prefix.feed(0)]
        assert inner <= prefix.replayed
        assert not inner & set(counts), "a stage that has ended is one tensor"
        assert counts["down"] == counts["fc"] == 2
        for found, part in zip(expected, parts, strict=True):
            torch.testing.assert_close(found, F.relu(model(part)))  # outside of `feed` all runs
        assert counts["layer1.0.conv1"] == 2
    kept = prefix._records[0, 0]
    assert len(kept) == 3, "stem, bn and layer1"


def test_records_stay_within_memory(network, task_of, tmp_path):
    runner = runner_of(network, task_of, tmp_path, "residual")
    parts = chunks(runner.builder.calibration, 32)
    stem = 64 * 16 * 8 * 8 * 4  # bytes of one feature map of 64 images
    with torch.no_grad():
        prefix = Prefix(runner.builder.model, parts, 3 * stem)
        seen = []
        for layer in runner.structure.layers:
            prefix.advance(layer.name, lambda active: None)
            held = sum(t.nbytes for record in prefix._records.values() for t in record.values())
            assert held <= 3 * stem
            seen.append(held)
    assert 3 * stem in seen, "it is used"
    assert "layer1" in prefix.replayed
    assert "layer1.1.bn2" in prefix.replayed


def test_two_bits_are_worse_than_eight_on_a_trained_network(tmp_path):
    from paretorch.configs import digits

    runner = LocalRunner(digits.task(), tmp_path, MeasurementSettings(calibration_images=128))
    found = measure_sensitivity(
        runner.builder, Space(weight_bits=(Rule((2, 4, 8)),), sparsity=(Rule((0.0, 0.5, 0.9)),))
    )
    for layer in runner.structure.layers:
        bits = [found.divergence(layer.name, b) for b in (8, 4, 2)]
        assert bits == sorted(bits)
        assert bits[2] > 20 * bits[0]
        assert found.divergence(layer.name, 32, 0.9) > found.divergence(layer.name, 32, 0.5)
    assert found.unit == KL
    assert all(row.divergence < 1e-3 for row in found.rows if (row.weight_bits, row.sparsity) == (8, 0.0))


def test_progress_is_told(network, task_of, tmp_path):
    heard = []
    runner = runner_of(network, task_of, tmp_path, "perceptron")
    measure_sensitivity(runner.builder, SPACE, lambda done, total, what: heard.append((done, total, what)))
    assert [done for done, _, _ in heard] == list(range(15))
    assert {total for _, total, _ in heard} == {15}
    assert [what for _, _, what in heard][::5] == ["1", "4", "7"]


# --- as data ----------------------------------------------------------------------------------------------------------


def test_it_survives_json():
    found = Sensitivity((SensitivityRow("a", 2, 0.5, math.inf, 10), SensitivityRow("b", 32, 0.25, 0.125, 20)), KL, 64)
    text = found.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert Sensitivity.from_json(text) == found
    assert Sensitivity.from_dict(found.to_dict()).divergence("a", 2, 0.5) == math.inf
    table = found.table()
    assert list(table.columns) == ["layer", "weight_bits", "sparsity", "divergence", "bytes", "unit"]
    assert set(table.unit) == {KL}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 99}', '{"version": 1, "unit": "", "images": 1, "rows": [{"layer": "a"}]}']
)
def test_what_is_no_sensitivity_is_refused(text):
    with pytest.raises(ArtifactError, match="sensitivity"):
        Sensitivity.from_json(text)
