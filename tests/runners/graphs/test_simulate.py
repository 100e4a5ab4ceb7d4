"""The simulation is the specification, by torch; and it notices a file that computes something else."""

import copy

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from paretorch.runners.files import packing
from paretorch.runners.graphs.float_graph import export_float
from paretorch.runners.graphs.simulate import Simulation, agreement, compared
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import PARITY_AGREEMENT as AGREE
from paretorch.runners.settings import PARITY_DIFFERENCE as CLOSE
from paretorch.runners.targets.runtime import session
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.quantize import Quantize

NETWORKS = ("residual", "mobile", "perceptron", "gated", "sound", "tokens", "branches", "convolutional")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_float_network_is_computed_as_torch_does(network, name):
    model, x = network(name)
    with torch.no_grad():
        expected = model(x[:40])
    found = Simulation(export_float(copy.deepcopy(model), x[:2]))(x[:40])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def node_model(node, shape, constants):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    tensors = [helper.make_tensor(n, TensorProto.FLOAT, a.shape, a.tobytes(), raw=True) for n, a in constants.items()]
    made = helper.make_model(
        helper.make_graph([node], "g", [x], [y], tensors), opset_imports=[helper.make_opsetid("", 21)]
    )
    made.ir_version = 10
    return made


CASES = {
    "asymmetric pads": (helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 0, 2, 3], strides=[2, 1]), (4, 4, 3, 3)),
    "groups and dilations": (
        helper.make_node("Conv", ["x", "w"], ["y"], group=4, dilations=[2, 1], pads=[2, 1, 2, 1]),
        (8, 1, 3, 3),
    ),
    "pool": (helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]), None),
    "pool, pads of its own": (
        helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 3], strides=[1, 2], pads=[0, 1, 1, 0]),
        None,
    ),
    "pool, rounded up": (
        helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
        None,
    ),
    "pool, padded and rounded up": (
        helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[3, 2], strides=[2, 3], pads=[1, 1, 1, 1], ceil_mode=1),
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_torch_means_what_the_runtime_means(case):
    node, shape = CASES[case]
    rng = np.random.default_rng(0)
    constants = {} if shape is None else {"w": rng.standard_normal(shape).astype(np.float32)}
    model = node_model(node, (2, 4, 9, 10), constants)
    x = rng.standard_normal((2, 4, 9, 10)).astype(np.float32) - 3  # below zero, so that pads of zeros would show
    (expected,) = session(model).run(None, {"x": x})
    np.testing.assert_allclose(Simulation(model)(torch.from_numpy(x)).numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def packed(network, task_of, tmp_path_factory):
    """`(the packed int8 file of a residual network, inputs)`."""
    model, x = network("residual")
    runner = LocalRunner(task_of(model, x), tmp_path_factory.mktemp("files"))
    return runner.build(Recipe(tuple(Quantize(layer.name, 6, 8) for layer in runner.structure.layers))), x


def test_a_file_agrees_with_its_simulation(packed):
    data, x = packed
    found, simulated, outputs = agreement(data, [x[:100], x[100:]], limit=150)
    assert found.n == found.answers == 150
    assert simulated.shape == outputs.shape == (150, 10)
    assert found.agree >= AGREE
    assert found.mean_difference < 1e-3


def test_a_runtime_that_computes_otherwise_is_found(packed):
    """A file with other zero points stands for a runtime that gets requantisation wrong."""
    data, x = packed
    model = packing.unpack(data)
    simulated = Simulation(model)(x[:128])
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_zero"):
            tensor.raw_data = bytes([tensor.raw_data[0] // 2])
    wrong = compared(simulated, Simulation(model)(x[:128]))
    right, _, _ = agreement(data, [x], limit=128)
    assert wrong.mean_difference > 0.01 > 10 * right.mean_difference


def test_answers_at_every_position_and_none_at_all():
    maps = torch.randn(3, 5, 4, 4)
    turned = compared(maps, maps.flip(1))
    assert turned.answers == 48
    assert turned.agree < AGREE
    regression = torch.randn(6, 1)
    same, off = compared(regression, regression), compared(regression, regression + 1)
    assert (same.answers, same.mean_difference) == (0, 0)
    assert off.mean_difference > CLOSE
