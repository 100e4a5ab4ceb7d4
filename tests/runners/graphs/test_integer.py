"""Quantized layers on whole numbers: to the last bit what ONNX Runtime's kernels give."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from paretorch.runners.files import packing
from paretorch.runners.graphs.integer import DOMAIN, OPS, fuse
from paretorch.runners.graphs.simulate import Simulation
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.targets.runtime import session, sums_are_exact
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import Quantize
from paretorch.spaces.techniques.recover import Recover

# Processors without VNNI add up pairs of products in 16 bits, which weights of more than 7 bits can overflow.
LARGEST = 63


class Graph:
    """A graph of quantized nodes: floats go in and are quantized, what comes out is dequantized."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.nodes, self.constants = [], []

    def constant(self, name, value):
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def scale(self, name, count=None):
        return self.constant(f"{name}_s", np.asarray(self.random.uniform(1e-2, 5e-2, count), np.float32))

    def quantized(self, name, wide=1.0, clamp=""):
        """Quantize and Dequantize a tensor at a scale and a zero point of its own; gives the second's output.

        clamp: Relu or Clip, ahead of these, which cuts off what they cannot hold anyway.
        """
        scale, zero = np.float32(wide * self.random.uniform(1e-2, 3e-2)), self.random.integers(0, 200)
        if clamp:
            zero = 0 if clamp == "Relu" else zero
            ends = {"low": scale * np.float32(0 - zero), "high": scale * np.float32(255 - zero)}
            bounds = [self.constant(f"{name}_{end}", at) for end, at in ends.items()] if clamp == "Clip" else []
            name = self.node(clamp, [name, *bounds], f"{name}_c")
        about = [self.constant(f"{name}_s", scale), self.constant(f"{name}_z", np.uint8(zero))]
        self.nodes.append(helper.make_node("QuantizeLinear", [name, *about], [f"{name}_q"]))
        self.nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *about], [f"{name}_d"]))
        return f"{name}_d"

    def weight(self, name, shape, axis, zero=0):
        """Per channel, or with a zero point of one scale for all."""
        if zero:
            values = self.random.integers(-LARGEST, LARGEST + 1, shape, dtype=np.int8)
            inputs = [self.constant(name, values), self.scale(name), self.constant(f"{name}_z", np.int8(zero))]
            self.nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}_d"]))
            return f"{name}_d"
        values = self.random.integers(-LARGEST, LARGEST + 1, shape, dtype=np.int8)
        inputs = [
            self.constant(name, values),
            self.scale(name, shape[axis]),
            self.constant(f"{name}_z", np.zeros(shape[axis], np.int8)),
        ]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}_d"], axis=axis))
        return f"{name}_d"

    def bias(self, x, name, count, zero=0):
        """As whole numbers at the scale of the sums."""
        self.nodes.append(helper.make_node("Mul", [f"{x}_s", f"{name}_s"], [f"{name}_bias_s"]))
        values = self.constant(f"{name}_bias", self.random.integers(-5000, 5000, count, dtype=np.int32))
        axis = {} if zero else {"axis": 0}
        self.nodes.append(helper.make_node("DequantizeLinear", [values, f"{name}_bias_s"], [f"{name}_bias_d"], **axis))
        return f"{name}_bias_d"

    def node(self, kind, inputs, output, **attributes):
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def model(self, inputs, output, rank):
        given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(x.shape)) for name, x in inputs.items()]
        result = helper.make_tensor_value_info(output, TensorProto.FLOAT, [None] * rank)
        graph = helper.make_graph(self.nodes, "g", given, [result], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model)
        return model


def agree(model, inputs, kinds):
    """The fused graph has exactly these operators of ours and gives what ONNX Runtime gives."""
    fused = fuse(model)
    assert [node.op_type for node in fused.graph.node if node.domain == DOMAIN] == kinds
    (found,) = ReferenceEvaluator(fused, new_ops=OPS).run(None, inputs)
    (expected,) = session(model).run(None, inputs)
    np.testing.assert_array_equal(found, expected)
    assume(len(np.unique(expected)) > 3)  # what is saturated would agree anyway


CLAMPS = st.sampled_from(("", "Relu", "Clip"))
POINTS = st.sampled_from((0, -40, 25))  # zero points of weights


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from((1, 2, 4, 8)), st.integers(1, 3), st.booleans(), CLAMPS, POINTS)
def test_a_convolution(seed, groups, stride, bias, clamp, zero):
    graph, random = Graph(seed), np.random.default_rng(seed)
    inputs = {"x": random.normal(size=(2, 8, 9, 7)).astype(np.float32)}
    x = graph.quantized("x")
    outputs = 16 if groups == 8 else 12
    given_bias = [graph.bias("x", "w", outputs, zero)] if bias else []
    w = graph.weight("w", (outputs, 8 // groups, 3, 3), 0, zero)
    y = graph.node(
        "Conv", [x, w, *given_bias], "y", group=groups, strides=[stride] * 2, pads=[1, 0, 1, 2], kernel_shape=[3, 3]
    )
    y = graph.quantized(y, 40 if zero else 8, clamp)
    agree(graph.model(inputs, y, 4), inputs, ["IntegerConv"])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.booleans(), CLAMPS, POINTS)
def test_a_linear_layer(seed, bias, clamp, zero):
    graph, random = Graph(seed), np.random.default_rng(seed)
    inputs = {"x": random.normal(size=(5, 40)).astype(np.float32)}
    x = graph.quantized("x")
    given_bias = [graph.bias("x", "w", 9, zero)] if bias else []
    y = graph.node("Gemm", [x, graph.weight("w", (9, 40), 0, zero), *given_bias], "y", transB=1)
    y = graph.quantized(y, 40 if zero else 8, clamp)
    agree(graph.model(inputs, y, 2), inputs, ["IntegerGemm"])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), CLAMPS)
def test_a_sum(seed, clamp):
    graph, random = Graph(seed), np.random.default_rng(seed)
    inputs = {name: random.normal(size=(3, 5, 6, 4)).astype(np.float32) for name in "ab"}
    y = graph.node("Add", [graph.quantized("a"), graph.quantized("b")], "y")
    y = graph.quantized(y, 2, clamp)
    agree(graph.model(inputs, y, 4), inputs, ["IntegerAdd"])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 15))
def test_an_average_over_all_positions(seed, side):
    graph, random = Graph(seed), np.random.default_rng(seed)
    inputs = {"x": random.normal(size=(3, 5, side, 4)).astype(np.float32)}
    y = graph.quantized(graph.node("GlobalAveragePool", [graph.quantized("x")], "y"))
    agree(graph.model(inputs, y, 4), inputs, ["IntegerGlobalAveragePool"])


def test_sums_that_float32_cannot_hold_are_added_up_in_float64():
    """More than 2^24: 3000 inputs of 255 times 63."""
    graph = Graph(3)
    inputs = {"x": np.full((2, 3000), 1e6, np.float32)}
    inputs["x"][1] = -1e6
    x = graph.quantized("x")
    w = graph.weight("w", (4, 3000), 0)
    graph.constants[-3].CopyFrom(numpy_helper.from_array(np.full((4, 3000), LARGEST, np.int8), "w"))
    y = graph.node("Gemm", [x, w], "y", transB=1)
    about = [graph.constant("y_s", np.float32(50.0)), graph.constant("y_z", np.uint8(7))]
    graph.nodes += [
        helper.make_node("QuantizeLinear", [y, *about], ["y_q"]),
        helper.make_node("DequantizeLinear", ["y_q", *about], ["y_d"]),
    ]
    model = graph.model(inputs, "y_d", 2)
    (found,) = ReferenceEvaluator(fuse(model), new_ops=OPS).run(None, inputs)
    np.testing.assert_array_equal(found, session(model).run(None, inputs)[0])


@pytest.mark.parametrize(
    "change",
    ["two users", "a result", "no Quantize", "alpha", "several zero points of the weight", "a ReLU that cuts off"],
)
def test_what_is_no_quantized_layer_stays_as_it_is(change):
    graph = Graph(0)
    inputs = {"x": np.zeros((2, 6), np.float32)}
    x = graph.quantized("x")
    w = graph.weight("w", (6, 6), 0)
    if change == "several zero points of the weight":
        graph.constants[-1].CopyFrom(numpy_helper.from_array(np.arange(6, dtype=np.int8), "w_z"))
    y = graph.node("Gemm", [x, w], "y", transB=1, alpha=0.5 if change == "alpha" else 1.0)
    y = graph.node("Relu", [y], "cut") if change == "a ReLU that cuts off" else y
    out = y if change == "no Quantize" else graph.quantized(y)
    if change == "two users":
        out = graph.node("Add", [out, y], "sum")
    model = graph.model(inputs, out, 2)
    if change == "a result":
        model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None]))
    assert fuse(model).graph.node == model.graph.node


@pytest.mark.parametrize(
    ("bits", "scheme"), [(7, "symmetric"), (4, "symmetric"), (2, "symmetric"), (7, "affine"), (3, "affine")]
)
@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_a_quantized_network_is_simulated_to_the_last_bit(name, bits, scheme, network, task_of, tmp_path):
    """All but the last layer, which writes floats: sums of 64 of them may come out in another order."""
    model, x = network(name)
    runner = LocalRunner(task_of(model, x), tmp_path, MeasurementSettings(calibration_images=64))
    steps = [Quantize(layer.name, bits, 8, scheme=scheme) for layer in runner.structure.layers]
    groups = [Prune(g.name, g.channels // 2) for g in runner.structure.groups[:1]]
    graph = packing.unpack(runner.build(Recipe((*steps, *groups, Recover("batchnorm")))))
    assert {"Conv", "Add"} & {
        node.op_type.removeprefix("Integer") for node in fuse(graph).graph.node if node.domain == DOMAIN
    }
    found = Simulation(graph)(x)
    expected = torch.from_numpy(session(graph).run(None, {graph.graph.input[0].name: x.numpy()})[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs", [2, 31, 512])
def test_whether_sums_are_exact_is_found_out(inputs):
    """Of numbers of all 8 bits: what a network of them would be told here."""
    random = np.random.default_rng(inputs)
    x = random.integers(128, 256, (5, inputs), dtype=np.uint8)
    weight = random.integers(100, 128, (inputs, 24), dtype=np.int8)
    nodes = [helper.make_node("MatMulInteger", ["x", "w"], ["y"])]
    ends = (
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["n", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, ["n", 24])],
    )
    graph = helper.make_graph(nodes, "sums", *ends, [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    exact = x.astype(int) @ weight.astype(int)
    plain = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert (plain.run(None, {"x": x})[0] == exact).all() == sums_are_exact()
    assert (session(model).run(None, {"x": x})[0] == exact).all(), "the sessions that measure are exact everywhere"
