"""The torch target: each operator against ONNX Runtime, alone; and whole networks."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from paretorch.errors import ExportFailed
from paretorch.runners.files import packing
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.targets import torch_graph
from paretorch.runners.targets.catalog import as_target
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.quantize import Quantize

RNG = np.random.default_rng(0)
INT = np.int64


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values):
    return np.array(values, INT)


def one(value):
    return np.array(value, np.float32)


MAPS = (2, 4, 6, 7)  # of images; the first axis is the batch
CASES = [
    ("Conv", MAPS, [floats(6, 4, 3, 3), floats(6)], {"pads": [1, 1, 1, 1], "strides": [2, 1]}),
    ("Conv", MAPS, [floats(6, 4, 3, 3)], {"pads": [0, 1, 2, 1], "dilations": [1, 2]}),
    ("Conv", MAPS, [floats(4, 1, 3, 3), floats(4)], {"group": 4}),
    ("Conv", (2, 4, 9), [floats(6, 4, 3), floats(6)], {"pads": [1, 1]}),
    ("ConvTranspose", MAPS, [floats(4, 3, 2, 2), floats(3)], {"strides": [2, 2], "output_padding": [1, 0]}),
    ("Gemm", (3, 5), [floats(4, 5), floats(4)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", (3, 5), [floats(5, 4)], {}),
    ("MatMul", (2, 3, 5), [floats(5, 4)], {}),
    ("MaxPool", MAPS, [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1}),
    ("MaxPool", MAPS, [], {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}),
    ("AveragePool", MAPS, [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("AveragePool", MAPS, [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    ("GlobalAveragePool", MAPS, [], {}),
    ("GlobalMaxPool", MAPS, [], {}),
    ("BatchNormalization", MAPS, [floats(4), floats(4), floats(4), np.abs(floats(4)) + 1], {"epsilon": 1e-3}),
    ("LayerNormalization", (2, 5, 8), [floats(8), floats(8)], {"axis": -1, "epsilon": 1e-3}),
    ("InstanceNormalization", MAPS, [floats(4), floats(4)], {"epsilon": 1e-3}),
    *(
        (kind, MAPS, [], {})
        for kind in ("Relu", "Sigmoid", "Tanh", "Erf", "Softplus", "HardSwish", "Exp", "Neg", "Abs")
    ),
    *((kind, MAPS, [], {}) for kind in ("Reciprocal", "Floor", "Identity", "Dropout", "Flatten", "Transpose")),
    ("Gelu", MAPS, [], {"approximate": "tanh"}),
    ("Gelu", MAPS, [], {}),
    ("Clip", MAPS, [one(-0.5), one(0.7)], {}),
    ("Clip", MAPS, [one(0.0)], {}),
    ("LeakyRelu", MAPS, [], {"alpha": 0.2}),
    ("Elu", MAPS, [], {"alpha": 0.7}),
    ("PRelu", MAPS, [floats(4, 1, 1)], {}),
    ("HardSigmoid", MAPS, [], {"alpha": 0.3, "beta": 0.4}),
    ("Softmax", MAPS, [], {"axis": 1}),
    ("LogSoftmax", MAPS, [], {}),
    ("Mean", (2, 3), [floats(1, 3), floats(3)], {}),
    *((kind, MAPS, [floats(4, 1, 1)], {}) for kind in ("Add", "Sub", "Mul", "Div", "Min", "Max")),
    ("Pow", MAPS, [one(2.0)], {}),
    ("ReduceMean", MAPS, [ints(2, 3)], {"keepdims": 0}),
    ("ReduceSum", MAPS, [], {"noop_with_empty_axes": 1}),
    *((kind, MAPS, [ints(-1)], {}) for kind in ("ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2")),
    ("ReduceMean", MAPS, [], {}),
    ("Flatten", MAPS, [], {"axis": 2}),
    ("Reshape", MAPS, [ints(0, -1, 3)], {}),
    ("Transpose", MAPS, [], {"perm": [0, 2, 3, 1]}),
    ("Squeeze", (2, 1, 5, 1), [ints(1, -1)], {}),
    ("Squeeze", (2, 1, 5, 1), [], {}),
    ("Unsqueeze", (2, 5), [ints(0, -1)], {}),
    ("Concat", MAPS, [floats(2, 3, 6, 7)], {"axis": 1}),
    ("Slice", MAPS, [ints(1, 5), ints(100, -100), ints(1, -1), ints(2, -2)], {}),
    ("Slice", MAPS, [ints(0), ints(1)], {}),
    ("Split", MAPS, [ints(1, 3)], {"axis": 1}),
    ("Split", MAPS, [], {"axis": 1, "num_outputs": 2}),
    ("Pad", MAPS, [ints(0, 1, 0, 2, 0, 3, 0, 1), one(0.5)], {}),
    ("Pad", MAPS, [ints(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": "reflect"}),
    ("Pad", MAPS, [ints(2, 1), "", ints(3)], {"mode": "edge"}),
    ("Gather", MAPS, [np.array([[0, -1], [2, 1]], INT)], {"axis": 1}),
    ("Gather", MAPS, [np.array(-1, INT)], {"axis": 2}),
    ("Expand", (2, 1, 5), [ints(2, 3, 1)], {}),
    ("Tile", (2, 3), [ints(2, 1)], {}),
]


def graph_of(nodes, shape, initializers, outputs):
    made = [numpy_helper.from_array(value, name) for name, value in initializers.items()]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            made,
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    ).SerializeToString()


def both(model, x):
    return (as_target(name).load(model, 1)(x) for name in ("torch", "onnxruntime"))


@pytest.mark.parametrize(("kind", "shape", "constants", "attributes"), CASES)
def test_an_operator_computes_what_it_does_in_onnx_runtime(kind, shape, constants, attributes):
    names = [f"c{n}" if not isinstance(value, str) else "" for n, value in enumerate(constants)]
    held = {name: value for name, value in zip(names, constants, strict=True) if name}
    outputs = ["y"] if kind != "Split" else ["x0", "y"]
    node = helper.make_node(kind, ["input", *names], outputs, **attributes)
    found, expected = both(graph_of([node], shape, held, ["y"]), floats(*shape))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_shapes_types_and_conditions():
    """The operators that exporters write around reshapes: each stands between floats here."""
    nodes = [
        helper.make_node("Shape", ["input"], ["s"]),
        helper.make_node("ConstantOfShape", ["s"], ["zeros"]),
        helper.make_node("Shape", ["input"], ["tail"], start=2),
        helper.make_node("Cast", ["tail"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Sqrt", ["wide"], ["root"]),
        helper.make_node("Log", ["wide"], ["log"]),
        helper.make_node("Greater", ["input", "zeros"], ["above"]),
        helper.make_node("Less", ["input", "half"], ["below"]),
        helper.make_node("Equal", ["above", "below"], ["inside"]),
        helper.make_node("Where", ["inside", "input", "zeros"], ["kept"]),
        helper.make_node("Add", ["kept", "root"], ["more"]),
        helper.make_node("Add", ["more", "log"], ["y"]),
    ]
    model = graph_of(nodes, (3, 4, 5), {"half": one(0.5)}, ["y"])
    found, expected = both(model, floats(3, 4, 5))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_every_operator_is_tested():
    tested = {kind for kind, *_ in CASES}
    tested |= {"Shape", "ConstantOfShape", "Cast", "Sqrt", "Log", "Greater", "Less", "Equal", "Where"}
    tested |= {"DynamicQuantizeLinear", "MatMulInteger"}  # in test_onnx_export.py
    assert tested == set(torch_graph.OPERATORS)


@pytest.mark.parametrize("name", ["residual", "mobile", "gated", "tokens", "branches", "sound"])
def test_a_network_computes_what_it_does_in_onnx_runtime(name, network, task_of, tmp_path):
    model, x = network(name)
    runner = LocalRunner(task_of(model, x), tmp_path, MeasurementSettings(calibration_images=32))
    steps = [
        Quantize(layer.name, bits) for layer, bits in zip(runner.structure.layers, (4, 16, 8, 3) * 9, strict=False)
    ]
    for recipe in (Recipe(), Recipe(tuple(steps))):
        data = packing.onnx_bytes(runner.build(recipe))
        found, expected = both(data, x.numpy())
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_file_with_another_operator_is_refused_by_its_name():
    node = helper.make_node("Hardmax", ["input"], ["y"])
    with pytest.raises(ExportFailed, match="no operator Hardmax; it has Conv"):
        as_target("torch").load(graph_of([node], (2, 3), {}, ["y"]), 1)
    with pytest.raises(ExportFailed, match="not an ONNX file"):
        as_target("torch").load(b"no ONNX file", 1)


def test_the_threads_of_the_process_stay_as_they_are():
    model = graph_of([helper.make_node("Relu", ["input"], ["y"])], (2, 3), {}, ["y"])
    network = as_target("torch").load(model, 2)
    assert torch.get_num_threads() == 1
    network(floats(2, 3))
    with pytest.raises(ExportFailed, match="does not run in PyTorch"):
        as_target("torch").load(
            graph_of([helper.make_node("MatMul", ["input", "w"], ["y"])], (2, 3), {"w": floats(3, 3)}, ["y"]), 2
        )(floats(2, 4))
    assert torch.get_num_threads() == 1


def test_activations_that_nothing_reads_any_more_are_let_go():
    graph = onnx.load_from_string(
        graph_of(
            [
                helper.make_node("Relu", ["input"], ["a"]),
                helper.make_node("Neg", ["a"], ["b"]),
                helper.make_node("Add", ["a", "b"], ["y"]),
            ],
            (2, 3),
            {},
            ["y"],
        )
    ).graph
    steps = [(None, tuple(node.input), tuple(node.output)) for node in graph.node]
    assert [sorted(names) for names in torch_graph._last_uses(steps, "y")] == [[], [], ["a", "b"]]
