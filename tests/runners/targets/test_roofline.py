"""Rooflines: multiply-adds and bytes as the structure counts them, and times by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from paretorch.errors import ExportFailed
from paretorch.objectives import cost
from paretorch.runners.files import packing
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.targets.catalog import as_target
from paretorch.runners.targets.roofline import Cost, Profile, analytic, costs, seconds
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.student import Student

PROFILE = Profile("npu", {"4x8": 4e12, "8x8": 2e12, "8x32": 1e11, "16x32": 1e11, "32x32": 1e11}, 1e10, 1e11)
MIXED = Recipe(
    (
        Student(("layer1.1",)),
        Prune("down", 16),
        Quantize("stem", 8, 8),
        Quantize("layer1.0.conv1", 4, 8),
        Quantize("layer1.0.conv2", 6),
        Quantize("fc", 16),
    )
)


@pytest.fixture
def runner(network, task_of, tmp_path):
    model, x = network("residual")
    return LocalRunner(
        task_of(model, x), tmp_path, MeasurementSettings(calibration_images=64, batch=2), target=analytic(PROFILE)
    )


def onnx_of(runner, recipe):
    return packing.onnx_bytes(runner.build(recipe))


@pytest.mark.parametrize(
    "name", ["residual", "mobile", "perceptron", "gated", "sound", "tokens", "branches", "convolutional"]
)
def test_multiply_adds_and_weights_are_those_of_the_structure(name, network, task_of, tmp_path):
    model, x = network(name)
    runner = LocalRunner(task_of(model, x), tmp_path, MeasurementSettings(calibration_images=32))
    found = costs(onnx_of(runner, Recipe()), 3)
    assert sum(c.macs for c in found) == 3 * cost.macs(runner.structure, Recipe())
    assert sum(c.weights for c in found) == sum(layer.params for layer in runner.structure.layers)
    assert {(c.weight_bits, c.activation_bits, c.input_bits, c.output_bits) for c in found} == {(32, 32, 32, 32)}


def test_widths_and_channels_are_read_off_the_file(runner):
    found = {c.name: c for c in costs(onnx_of(runner, MIXED))}
    assert sum(c.macs for c in found.values()) == cost.macs(runner.structure, MIXED)
    widths = {name: (c.weight_bits, c.activation_bits) for name, c in found.items()}
    assert widths == {
        "stem": (8, 8),
        "layer1.0.conv1": (4, 8),
        "layer1.0.conv2": (6, 32),
        "down": (32, 32),
        "layer2.0.conv1": (32, 32),
        "layer2.0.conv2": (32, 32),
        "fc": (16, 32),
    }
    assert found["stem"].weights == 16 * 3 * 9
    assert (found["stem"].inputs, found["stem"].outputs) == (3 * 64, 16 * 64)
    # Its output is read by an int8 layer and as a float by the Add.
    assert (found["layer1.0.conv1"].input_bits, found["layer1.0.conv1"].output_bits) == (8, 8)


def test_widths_of_activations_are_those_of_the_file(runner):
    """What a narrow layer writes is as wide as the layer behind it reads."""
    widths = {"stem": 16, "layer1.0.conv1": 16, "layer1.0.conv2": 4, "layer2.0.conv1": 8, "fc": 16}
    recipe = Recipe(tuple(Quantize(name, 8, bits) for name, bits in widths.items()))
    found = {c.name: c for c in costs(onnx_of(runner, recipe))}
    assert {name: found[name].activation_bits for name in widths} == widths
    assert (found["layer1.0.conv1"].output_bits, found["layer1.0.conv2"].input_bits) == (4, 4)
    npu = analytic(Profile("npu", {"8x16": 1e12, "32x32": 1e11}, 1e10, 1e11))
    assert npu.supports(Quantize("fc", 8, 16)) is None
    assert "no unit for 8-bit weights with 4-bit activations" in str(npu.supports(Quantize("fc", 8, 4)))


def test_signs_and_ternary_weights_and_groups_are_told_apart(network, task_of, tmp_path):
    model, x = network("tokens")
    runner = LocalRunner(task_of(model, x), tmp_path, MeasurementSettings(calibration_images=32))
    steps = [
        Quantize("embed", 1, 8),
        Quantize("up", 2, 8),
        Quantize("down", 1, group_size=16),
        Quantize("head", 3, group_size=32),
    ]
    found = {c.name: (c.weight_bits, c.activation_bits) for c in costs(onnx_of(runner, Recipe(tuple(steps))))}
    assert found == {"embed": (1, 8), "up": (2, 8), "down": (1, 32), "head": (3, 32)}
    late = Quantize("up", 8, 8, activations="dynamic")
    assert "finds no ranges at run time" in analytic(PROFILE).supports(late)


def test_a_latency_is_the_sum_of_rooflines_and_exact(runner):
    baseline, _ = runner.baseline()
    found = [runner.run(MIXED).metrics["latency_ms"] for _ in range(2)]
    assert found[0] == found[1]
    assert found[0].low == found[0].value == found[0].high
    by_hand = 0.0
    for c in costs(onnx_of(runner, MIXED), 2):
        width = next(w for w in (4, 8, 16, 32) if w >= c.weight_bits)
        rate = {(4, 8): 4e12, (8, 8): 2e12}.get((width, c.activation_bits), 1e11)
        moved = (c.inputs * c.input_bits + c.outputs * c.output_bits) / 8
        by_hand += max(2 * c.macs / rate, c.weights * width / 8 / 1e10, moved / 1e11)
    assert found[0].value == pytest.approx(1e3 * by_hand, rel=1e-12)
    assert found[0].value < baseline.value("latency_ms")


def test_accuracy_is_that_of_onnx_runtime(runner, network, task_of, tmp_path):
    model, x = network("residual")
    other = LocalRunner(task_of(model, x), tmp_path, MeasurementSettings(calibration_images=64))
    data = runner.build(MIXED)
    np.testing.assert_array_equal(runner.scores(data), other.scores(data))


LAYER = Cost("fc", 10**6, 10**5, 8, 8, 1000, 8, 500, 32)


@given(st.floats(1e6, 1e15), st.floats(1e6, 1e15), st.floats(1e6, 1e15), st.booleans(), st.floats(0, 1e-3))
def test_a_layer_takes_as_long_as_its_slowest_part(operations, weights, activations, shared, start):
    profile = Profile("p", {"8x8": operations, "32x32": 1e9}, weights, activations, shared, start)
    parts = 2e6 / operations, 1e5 / weights, 3000 / activations
    expected = max(parts[0], parts[1] + parts[2]) if shared else max(parts)
    assert seconds(LAYER, profile) == pytest.approx(expected + start, rel=1e-9)


def test_widths_without_a_unit_take_the_next_wider_one_or_are_refused():
    profile = Profile("p", {"32x32": 1e9, "8x8": 4e9, "4x8": 8e9}, 1e30, 1e30)
    took = [seconds(Cost("fc", 10**9, 1, bits, 8, 1, 8, 1, 8), profile) for bits in (2, 4, 5, 8, 16)]
    assert took == [0.25, 0.25, 0.5, 0.5, 2.0]
    with pytest.raises(ExportFailed, match=r"layer fc has 64-bit weights.* p has 32x32, 8x8, 4x8"):
        seconds(Cost("fc", 1, 1, 64, 32, 1, 32, 1, 32), profile)


def test_supports_names_the_units_that_are_there():
    supports = analytic(PROFILE).supports
    assert supports(Quantize("fc", 4, 8)) is None
    assert (
        supports(Quantize("fc", 3, 8))
        == "npu has no unit for 3-bit weights with 8-bit activations; it has 4x8, 8x8, 8x32, 16x32, 32x32"
    )
    assert supports(Quantize("fc", 4)) is not None
    assert supports(Prune("fc", 3)) is None


def test_a_profile_survives_a_study_and_changes_with_every_number():
    target = analytic(PROFILE)
    again = as_target(target.spec)
    assert again.environment == target.environment
    other = analytic(Profile("npu", {**PROFILE.operations, "8x8": 2.1e12}, 1e10, 1e11))
    assert other.environment != target.environment


def graph_of(nodes, shape, **tensors):
    made = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    ends = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("input", shape), ("y", None)))
    graph = helper.make_graph(nodes, "g", [next(ends)], [next(ends)], made)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def test_a_product_of_activations_and_a_transposed_convolution():
    nodes = [
        helper.make_node("Transpose", ["input"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["input", "t"], ["m"]),
        helper.make_node("ConvTranspose", ["m", "w"], ["y"], strides=[2]),
    ]
    model = graph_of(nodes, ["batch", 4, 6], w=np.ones((4, 3, 2), np.float32))
    product, transposed = costs(model, 2)
    assert (product.macs, product.weights, product.inputs, product.outputs) == (2 * 4 * 4 * 6, 0, 2 * 48, 32)
    assert (transposed.macs, transposed.weights, transposed.outputs) == (32 * 3 * 2, 24, 2 * 3 * 8)


def test_weights_in_blocks_of_few_bits():
    node = helper.make_node(
        "MatMulNBits", ["input", "b", "s"], ["y"], domain="com.microsoft", K=32, N=8, bits=4, block_size=32
    )
    model = graph_of([node], ["batch", 32], b=np.zeros((8, 1, 16), np.uint8), s=np.ones(8, np.float32))
    (found,) = costs(model, 5)
    assert (found.macs, found.weights, found.weight_bits, found.activation_bits) == (5 * 256, 256, 4, 32)


def test_a_file_that_does_not_run_is_a_failed_candidate():
    with pytest.raises(ExportFailed, match="not an ONNX file"):
        costs(b"no ONNX file")
    open_shape = graph_of([helper.make_node("Relu", ["input"], ["y"])], ["batch", "n"])
    with pytest.raises(ExportFailed, match="the shapes beyond the batch are open"):
        costs(open_shape)
    assert costs(graph_of([helper.make_node("Relu", ["input"], ["y"])], ["batch", 3])) == []
    assert math.isclose(
        analytic(PROFILE).milliseconds(graph_of([helper.make_node("Relu", ["input"], ["y"])], ["batch", 3]), 1), 0
    )
