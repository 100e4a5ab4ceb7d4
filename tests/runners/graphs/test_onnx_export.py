"""The file that ships: valid ONNX, what it computes by the specification, and what really runs in ONNX Runtime."""

import copy
import itertools

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional as F

from paretorch.errors import ExportFailed
from paretorch.objectives import cost
from paretorch.runners.compression.compress import compress
from paretorch.runners.compression.freeze import freeze
from paretorch.runners.compression.trace import trace
from paretorch.runners.files import packing
from paretorch.runners.graphs import simulate
from paretorch.runners.graphs.float_graph import export_float
from paretorch.runners.graphs.onnx_export import batch_of, operators, quantized_graph
from paretorch.runners.graphs.simulate import Simulation
from paretorch.runners.operators.fold import fold_batchnorms
from paretorch.runners.operators.frozen import FrozenWeight
from paretorch.runners.settings import PARITY_AGREEMENT
from paretorch.runners.targets.runtime import DISABLED_OPTIMIZERS, session, session_options
from paretorch.runners.targets.torch_graph import OPERATORS
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.prune import Prune
from paretorch.spaces.techniques.quantize import SCHEMES, Quantize
from paretorch.spaces.techniques.sparsify import Sparsify
from paretorch.spaces.techniques.student import Student

NETWORKS = ("residual", "mobile", "perceptron", "gated", "sound", "tokens", "branches", "convolutional")
INT8 = {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat"}
FLOAT = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul"}


def export(model, x, recipe, structure=None, **options):
    """`(the ONNX model, the torch network with the same weights and float activations)`."""
    structure = structure or trace(model, x[:66])
    live = compress(copy.deepcopy(model), recipe, structure, x[:2])
    frozen = freeze(live, recipe)
    reference = copy.deepcopy(live)
    factors = fold_batchnorms(live, structure.folds)
    graph = quantized_graph(live, x[:2], frozen, factors, x[:256].split(32), **options)
    onnx.checker.check_model(graph, full_check=True)
    return graph, reference


def run(graph, x, sizes=(1, 2, 7)):
    """The outputs in ONNX Runtime, in batches of several sizes."""
    runner, outputs, start = session(graph), [], 0
    for size in [*sizes, len(x) - sum(sizes)]:
        outputs.append(runner.run(None, {"input": x[start : start + size].numpy()})[0])
        start += size
    return np.concatenate(outputs)


def agreement(a, b):
    return float((a.reshape(len(a), -1).argmax(1) == b.reshape(len(b), -1).argmax(1)).mean())


def optimized(graph, folder):
    """The graph that ONNX Runtime makes of a model and runs."""
    options = session_options(1)
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(
        graph.SerializeToString(), options, ["CPUExecutionProvider"], disabled_optimizers=DISABLED_OPTIMIZERS
    )
    return onnx.load(options.optimized_model_filepath)


def plans(structure):
    names = [layer.name for layer in structure.layers]
    return {
        "int8": [Quantize(n, 8, 8) for n in names],
        "int4": [Quantize(n, 4, 8) for n in names],
        "even int8, odd float": [Quantize(n, 8, 8) for n in names[::2]],
        "odd int8, even 3 bits": [Quantize(n, 8 if i % 2 else 3, 8 if i % 2 else 32) for i, n in enumerate(names)],
        "mixed bits": [Quantize(n, 2 + i % 7, 8 if i % 3 else 32) for i, n in enumerate(names)],
        "sparse int8": [step for n in names for step in (Quantize(n, 8, 8), Sparsify(n, 0.5))],
        "3 bits": [Quantize(n, 3) for n in names],
        "signs": [Quantize(n, 1, 8 if i % 3 else 32) for i, n in enumerate(names)],
        "8 bits": [Quantize(n, 8) for n in names],
        "half": [Quantize(n, 16) for n in names],
        "sparse": [Sparsify(n, 0.5) for n in names],
        "untouched": [],
    }


PLANS = (
    "int8",
    "int4",
    "even int8, odd float",
    "odd int8, even 3 bits",
    "mixed bits",
    "sparse int8",
    "3 bits",
    "signs",
    "8 bits",
    "half",
    "sparse",
    "untouched",
)


@pytest.fixture(scope="module")
def traced(network):
    """Each network once: `(model, inputs, structure)`."""
    found = {}

    def get(name):
        if name not in found:
            model, x = network(name)
            found[name] = (model, x, trace(model, x[:66]))
        return found[name]

    return get


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_computes_what_it_says_and_runs_as_planned(name, plan, traced, tmp_path):
    model, x, structure = traced(name)
    recipe = Recipe(tuple(plans(structure)[plan]))
    graph, reference = export(model, x, recipe, structure)
    graph = packing.unpack(packing.pack(graph))
    found = run(graph, x)
    with torch.no_grad():
        floats = reference(x).numpy()

    int8 = {step.layer for step in recipe.of(Quantize) if step.activation_bits == 8}
    if int8:
        # Activations in 8 bits: what the ONNX specification makes of the file, which knows of no integer kernels.
        expected = ReferenceEvaluator(graph).run(None, {"input": x[:64].numpy()})[0]
        assert agreement(found[:64], expected) >= 0.99
        assert np.abs(found[:64] - expected).mean() < 0.002 * expected.std()
        # And they are close to float activations, or the ranges are wrong.
        assert np.abs(found - floats).mean() < 0.05 * floats.std()
    else:
        tolerance = 2e-3 if plan == "half" else 1e-4
        np.testing.assert_allclose(found, floats, rtol=tolerance, atol=tolerance * np.abs(floats).max())

    running = optimized(graph, tmp_path)
    kinds = [node.op_type for node in running.graph.node]
    assert sum(kind in INT8 for kind in kinds) == len(int8)
    assert sum(kind in FLOAT for kind in kinds) == len(structure.layers) - len(int8)
    assert operators(graph) == {kind: kinds.count(kind) for kind in set(kinds)}
    constants = {tensor.name for tensor in running.graph.initializer}
    for node in running.graph.node:
        if node.op_type in FLOAT:  # weights of float layers are floats at run time: nothing is unpacked in each run
            assert node.input[1] in constants
    if plan == "int8":
        assert "QLinearMatMul" not in kinds  # between a linear layer over tokens and its bias nothing is rounded
        assert kinds.count("Add") + kinds.count("Concat") + kinds.count("AveragePool") == (4 if name == "tokens" else 0)


@pytest.mark.parametrize("others", [None, 8])
@pytest.mark.parametrize("name", ["perceptron", "tokens", "residual", "branches"])
def test_dynamic_ranges_are_those_of_each_call(name, others, traced, tmp_path):
    """One kernel a layer in ONNX Runtime, what ONNX's reference makes of the file, and for each batch ranges of its
    own.
    """
    model, x, structure = traced(name)
    linear = [layer.name for layer in structure.layers if layer.kind == "linear"]
    steps = [Quantize(n, (8, 4, 2, 1)[i % 4], 8, activations="dynamic") for i, n in enumerate(linear)]
    static = [layer.name for layer in structure.layers if others and layer.name not in linear]
    if name == "tokens" and others:  # a static layer before and a dynamic one behind it
        static, steps = linear[::2], steps[1::2]
    graph, reference = export(model, x, Recipe((*steps, *(Quantize(n, 8, 8) for n in static))), structure)
    graph = packing.unpack(packing.pack(graph))
    running = optimized(graph, tmp_path)
    kinds = [node.op_type for node in running.graph.node]
    assert kinds.count("DynamicQuantizeMatMul") == len(steps)
    assert sum(kind in INT8 for kind in kinds) == len(static)
    assert sum(kind in FLOAT for kind in kinds) == len(structure.layers) - len(static) - len(steps)
    assert not {"MatMulInteger", "DynamicQuantizeLinear"} & set(kinds)
    batch = (
        x[:64] * torch.linspace(0.5, 50.0, 64).view(-1, *[1] * (x.ndim - 1)) if not static else x[:64]
    ).contiguous()
    expected = ReferenceEvaluator(graph).run(None, {"input": batch.numpy()})[0]
    found = session(graph).run(None, {"input": batch.numpy()})[0]
    assert agreement(found, expected) >= 0.98
    assert np.abs(found - expected).mean() < 0.003 * expected.std()
    few = ReferenceEvaluator(graph).run(None, {"input": batch[:16].numpy()})[0]  # another batch, other ranges
    np.testing.assert_allclose(Simulation(graph)(batch[:16]).numpy(), few, atol=1e-4 * np.abs(few).max())
    assert simulate.agreement(packing.pack(graph), [batch])[0].agree >= PARITY_AGREEMENT
    with torch.no_grad():
        floats = reference(batch).numpy()
    assert np.abs(found - floats).mean() < 0.05 * floats.std()
    if not static:  # inputs 100 times as large: no range of the calibration images would do
        large = session(graph).run(None, {"input": (100 * batch).numpy()})[0]
        with torch.no_grad():
            floats = reference(100 * batch).numpy()
        assert np.abs(large - floats).mean() < 0.05 * floats.std()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 9), st.integers(0, 999), st.sampled_from([1e-6, 1.0, 1e6]))
def test_dynamic_quantization_in_torch_is_onnxs(rows, inputs, outputs, seed, size):
    """DynamicQuantizeLinear and MatMulInteger as the specification has them."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, inputs)) * size * rng.integers(0, 2)).astype(np.float32)
    w = rng.integers(-127, 128, (inputs, outputs)).astype(np.int8)
    nodes = [
        onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        onnx.helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),
    ]
    values = [onnx.helper.make_tensor_value_info(n, k, None) for n, k in (("q", 2), ("s", 1), ("z", 2), ("i", 6))]
    entry = onnx.helper.make_tensor_value_info("x", 1, x.shape)
    graph = onnx.helper.make_graph(nodes, "g", [entry], values, [numpy_helper.from_array(w, "w")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    model.ir_version = 10
    q, s, z, i = session(model).run(None, {"x": x})
    ours = OPERATORS["DynamicQuantizeLinear"]([torch.tensor(x)], {})
    assert float(ours[1]) == pytest.approx(float(s), rel=1e-6)
    assert int(ours[2]) == int(z)
    assert np.abs(ours[0].numpy().astype(int) - q).max() <= 1  # at the border of two steps
    found = OPERATORS["MatMulInteger"]([torch.tensor(q), torch.tensor(w), torch.tensor(z)], {})
    assert np.array_equal(found.numpy(), i)


def test_int8_layers_against_fake_quantization_in_torch(network):
    """Each step by hand: uint8 inputs, int8 weights, int32 bias, uint8 outputs behind the ReLU."""
    model, x = network("perceptron")
    structure = trace(model, x[:66])
    recipe = Recipe(tuple(Quantize(layer.name, 6, 8) for layer in structure.layers))
    graph, _ = export(model, x, recipe)
    tensors = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}

    def fake(values, name):
        scale, zero = torch.tensor(tensors[f"{name}_scale"]), float(tensors[f"{name}_zero"])
        return ((values / scale).round() + zero).clamp(0, 255).sub(zero) * scale

    # Ranges: the mean over the batches of the minimum and of the maximum, zero included (Jacob et al. 2018).
    batches = x.flatten(1).split(32)
    low = np.mean([float(b.min()) for b in batches])
    high = np.mean([float(b.max()) for b in batches])
    inputs = next(node.input[0] for node in graph.graph.node if node.op_type == "QuantizeLinear")
    assert float(tensors[f"{inputs}_scale"]) == pytest.approx((high - low) / 255, rel=1e-5)
    assert int(tensors[f"{inputs}_zero"]) == round(-low / ((high - low) / 255))

    values = x.flatten(1)
    quantized = {node.output[0]: node.input[0] for node in graph.graph.node if node.op_type == "DequantizeLinear"}
    source = {out: name.removesuffix("_q8") for out, name in quantized.items() if name.endswith("_q8")}
    gemms = [node for node in graph.graph.node if node.op_type == "Gemm"]
    for node, layer in zip(gemms, structure.layers, strict=True):
        values = fake(values, source[node.input[0]])
        weight = torch.tensor(tensors[f"{layer.name}.weight_q"].astype(np.float32) * tensors[f"{layer.name}.weight_s"])
        assert np.abs(tensors[f"{layer.name}.weight_q"]).max() == 31
        steps = torch.tensor(tensors[f"{node.output[0]}_bias_q"].astype(np.float32))
        bias = (
            steps * float(tensors[f"{source[node.input[0]]}_scale"]) * torch.tensor(tensors[f"{layer.name}.weight_s"])
        )
        values = values @ weight + bias
        if node is not gemms[-1]:
            values = F.relu(values)
    found = run(graph, x)
    assert agreement(found, values.numpy()) >= 0.99
    np.testing.assert_allclose(found, values.numpy(), atol=0.02 * float(values.std()))


@pytest.mark.parametrize(
    ("bits", "activations", "kind"),
    [
        (1, 8, "INT2"),
        (2, 8, "INT2"),
        (3, 8, "INT4"),
        (4, 8, "INT4"),
        (5, 8, "INT8"),
        (8, 8, "INT8"),
        (1, 32, "INT2"),
        (2, 32, "INT2"),
        (4, 32, "INT4"),
        (5, 32, "INT8"),
        (8, 32, "INT8"),
        (16, 32, "FLOAT16"),
    ],
)
def test_weights_are_stored_in_their_type_only(bits, activations, kind, network):
    model, x = network("perceptron")
    graph, _ = export(model, x, Recipe(tuple(Quantize(name, bits, activations) for name in ("1", "4", "7"))))
    large = {t.name: t for t in graph.graph.initializer if len(t.dims) == 2 and min(t.dims) > 1}
    assert {TensorProto.DataType.Name(t.data_type) for t in large.values()} == {kind}
    assert graph.opset_import[0].version == (25 if kind == "INT2" else 21)
    assert len(large) == 3
    if bits <= 8:
        top = max(1, 2 ** (bits - 1) - 1)
        values = [np.abs(numpy_helper.to_array(t).astype(int)) for t in large.values()]
        assert all(v.max() == top and (v.min() == 1 or bits > 1) for v in values)


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("name", ["residual", "mobile", "perceptron", "tokens"])
def test_activations_of_4_8_and_16_bits(name, scheme, traced):
    """As the specification says, and the file says the type. What is beyond a range is cut off at any width.

    ONNX Runtime 1.32 would round what is of 16 bits to 8, where it knows the form of the weight.
    """
    model, x, structure = traced(name)
    errors = {}
    for bits, kind in ((4, "UINT4"), (8, "UINT8"), (16, "UINT16")):
        recipe = Recipe(tuple(Quantize(layer.name, 8, bits, scheme=scheme) for layer in structure.layers))
        graph, reference = export(model, x, recipe, structure)
        zeros = {node.input[2] for node in graph.graph.node if node.op_type == "QuantizeLinear"}
        types = {TensorProto.DataType.Name(t.data_type) for t in graph.graph.initializer if t.name in zeros}
        assert types == {kind}
        found = run(graph, x)
        with torch.no_grad():
            expected = reference(x).numpy()
        errors[bits] = float(np.abs(found - expected).mean() / np.abs(expected).max())
        simulated = Simulation(graph)(x[:64]).numpy()
        assert np.abs(simulated - found[:64]).mean() <= 2e-3 * np.abs(simulated).max()
    assert errors[16] < errors[8] / 3
    assert errors[8] < errors[4] / 4


def test_a_tensor_is_as_wide_as_its_widest_reader(traced):
    """Layers of other widths in front of it, beside it and behind it."""
    model, x, structure = traced("residual")
    widths = dict(zip([layer.name for layer in structure.layers], itertools.cycle((8, 16, 4))))
    recipe = Recipe(tuple(Quantize(name, 8, bits) for name, bits in widths.items()))
    graph, _ = export(model, x, recipe, structure)
    types = {t.name: TensorProto.DataType.Name(t.data_type) for t in graph.graph.initializer}
    maker = {name: node for node in graph.graph.node for name in node.output}
    readers = {}
    for node in graph.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            name = node.input[1].removesuffix(".weight_dq")
            source = maker[node.input[0]]
            readers.setdefault(source.input[0], []).append(
                (widths[name], int(types[source.input[2]].removeprefix("UINT")))
            )
    for asked in readers.values():
        assert {given for _, given in asked} == {max(bits for bits, _ in asked)}
    assert len({given for asked in readers.values() for _, given in asked}) == 3
    assert agreement(run(graph, x)[:64], Simulation(graph)(x[:64]).numpy()) >= 0.98


@pytest.mark.parametrize("bits", [0, 8])
def test_names_cost_little(bits, traced):
    """Paths of modules, once for each of a tensor's companions, were half of what is not weights."""
    model, x, structure = traced("residual")
    recipe = Recipe(tuple(Quantize(layer.name, bits, 8) for layer in structure.layers if bits))
    graph = export(model, x, recipe, structure)[0].graph
    names = {name for node in graph.node for name in [*node.input, *node.output]} | {t.name for t in graph.initializer}
    assert not {name for name in names if "/" in name or "::" in name}
    for layer in structure.layers:
        assert any(name.startswith(f"{layer.name}.weight") for name in names), layer.name


def test_signs_stay_signs_where_a_channel_is_switched_off(network):
    """BatchNorm's factor of 0, and a bias that asks for larger steps than the weights have: still a bit for each
    weight.
    """
    model, x = network("perceptron")
    with torch.no_grad():
        model[2].weight[3], model[2].bias[3] = 0.0, 5.0
    recipe = Recipe(tuple(Quantize(name, 1, 8) for name in ("1", "4", "7")))
    graph, reference = export(model, x, recipe)
    weights = [m.weight.numel() for m in model if isinstance(m, nn.Linear)]
    data = packing.pack(graph)
    assert packing.unpack(data) == graph
    stored = packing.tensor_bytes(data).values()
    assert all(-(-count // 8) in stored for count in weights)
    found, floats = run(graph, x), reference(x).detach().numpy()
    assert np.abs(found - floats).mean() < 0.05 * floats.std()


@pytest.mark.parametrize("name", NETWORKS)
def test_two_bits_in_opset_25_run_as_the_same_codes_in_opset_21(name, traced):
    """INT2 needs a newer opset than the rest; neither its operators nor its numbers may be others."""
    model, x, structure = traced(name)
    steps = [Quantize(layer.name, 2, 8 if i % 3 else 32) for i, layer in enumerate(structure.layers)]
    graph, _ = export(model, x, Recipe(tuple(steps)), structure)
    wider = onnx.ModelProto()
    wider.CopyFrom(graph)
    wider.opset_import[0].version = 21
    for tensor in wider.graph.initializer:
        if tensor.data_type == TensorProto.INT2:
            raw = packing.codes_to_raw(numpy_helper.to_array(tensor).astype(np.int8).reshape(-1), TensorProto.INT4)
            tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, TensorProto.INT4, tensor.dims, raw, raw=True))
    assert operators(graph) == operators(wider)
    assert np.array_equal(run(graph, x), run(wider, x))


@pytest.mark.parametrize(("outputs", "bits"), [(4096, 3), (4095, 4), (4096, 2)])
def test_large_linear_layers_of_3_and_4_bits_stay_packed(outputs, bits, tmp_path):
    """From 8 million weights on: the same product, but no floats of the weights, neither in the file nor in memory."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(2048, outputs), nn.ReLU(), nn.Linear(outputs, 4)).eval(), torch.randn(8, 2048)
    top = 2 ** (bits - 1) - 1
    codes, scale = torch.randint(-top, top + 1, (outputs, 2048)).float(), torch.rand(outputs) + 0.5
    with torch.no_grad():
        model[0].weight.copy_(codes * scale[:, None])
        expected = model(x).numpy()
    graph = quantized_graph(model, x, {"0": FrozenWeight(bits, 32, codes, scale)}, {}, [x])
    onnx.checker.check_model(graph, full_check=True)
    stays = outputs == 4096 and bits in (3, 4)
    assert [node.op_type for node in graph.graph.node].count("MatMulNBits") == stays
    packed = packing.pack(graph)
    graph = packing.unpack(packed)
    weights = outputs * 2048
    floats = 4 * (6 * outputs + 4)  # scales, biases, and the second layer
    assert graph.ByteSize() == pytest.approx(floats + weights * (2 if bits == 2 else 4) / 8, abs=2000)
    least = cost.weight_bytes(weights, bits, int(codes.count_nonzero()))
    assert len(packed) == pytest.approx(floats + least, abs=2000)
    np.testing.assert_allclose(run(graph, x, (1, 2)), expected, atol=1e-5 * expected.std())
    running = optimized(graph, tmp_path)
    assert {node.op_type for node in running.graph.node} >= ({"MatMulNBits"} if stays else {"FusedGemm"})
    largest = max(len(tensor.raw_data) for tensor in running.graph.initializer)
    assert largest == (weights // 2 if stays else weights * 4)


@pytest.mark.parametrize(("activations", "how"), [(32, "static"), (8, "static"), (8, "dynamic")])
@pytest.mark.parametrize("name", NETWORKS)
def test_affine_weights_have_one_scale_and_one_zero_point(name, activations, how, traced, tmp_path):
    """Zeros stay zero, the kernels are those of symmetric weights, and nothing is left to be unpacked at run time."""
    model, x, structure = traced(name)
    layers = [layer for layer in structure.layers if how == "static" or layer.kind == "linear"]
    if not layers:
        return
    bits = (3, 7, 4, 2, 5)
    plans = {
        scheme: Recipe(
            tuple(
                step
                for i, layer in enumerate(layers)
                for step in (
                    Quantize(layer.name, bits[i % 5], activations, activations=how, scheme=scheme),
                    Sparsify(layer.name, 0.5),
                )
            )
        )
        for scheme in SCHEMES
    }
    symmetric, _ = export(model, x, plans["symmetric"], structure)
    graph, reference = export(model, x, plans["affine"], structure)
    assert operators(graph) == operators(symmetric)
    data = packing.pack(graph)
    assert packing.unpack(data) == graph

    tensors = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    for i, layer in enumerate(layers):
        values, scale, zero = (tensors[f"{layer.name}.weight_{part}"] for part in "qsz")
        assert scale.size == zero.size == 1
        assert -(2 ** (bits[i % 5] - 1)) <= int(values.astype(int).min())
        assert int(values.astype(int).max()) < 2 ** (bits[i % 5] - 1)
        assert int((values.astype(int) == int(zero)).sum()) >= round(0.5 * values.size)

    found = run(graph, x, sizes=())
    simulated = Simulation(graph)(x).numpy()
    if activations == 32:
        with torch.no_grad():
            expected = reference(x).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
        np.testing.assert_allclose(simulated, expected, atol=1e-4 * np.abs(expected).max())
        return
    if how == "dynamic":  # ranges are those of a batch, and the simulation takes 16 inputs at a time
        found, simulated = run(graph, x[:16], sizes=()), simulated[:16]
    assert agreement(found, simulated) >= 0.99
    assert np.abs(found - simulated).mean() <= 1e-3 * np.abs(found).max()


@pytest.mark.parametrize("off", [5, 6])
@pytest.mark.parametrize("activations", [8, 32])
def test_channels_that_are_switched_off_do_not_move_the_one_scale(off, activations, settle):
    model, x = settle(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3)), (3, 8, 8))
    with torch.no_grad():
        model[1].weight[:off] = 0
        model[1].bias += 1
    graph, reference = export(model, x, Recipe(tuple(Quantize(name, 8, activations, scheme="affine") for name in "03")))
    with torch.no_grad():
        expected = reference(x).numpy()
    assert np.abs(run(graph, x) - expected).mean() <= 5e-3 * np.abs(expected).max()


def test_a_bias_that_is_too_large_for_the_steps_of_affine_weights():
    """The whole weight takes the smallest scale at which the bias fits into int32, and what the bias is stays."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    with torch.no_grad():
        model[0].weight *= 1e-12
        model[0].bias.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    x = torch.randn(64, 3, 8, 8)
    names = tuple(Quantize(name, 8, 8, scheme="affine") for name in "02")
    graph, reference = export(model, x, Recipe(names))
    with torch.no_grad():
        expected = reference(x).numpy()
    np.testing.assert_allclose(run(graph, x), expected, atol=2e-2 * np.abs(expected).max())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["perceptron", "tokens"])
def test_groups_of_weights_have_scales_of_their_own(name, packed, traced):
    """Whole groups, one that is cut short and one that is longer than the row; BatchNorm's factors, zeros; folded at
    loading.
    """
    model, x, structure = traced(name)
    names = [layer.name for layer in structure.layers]
    sizes = (32, 32, 16, 16) if packed else (128, 32, 16, 256)
    steps = [Quantize(n, (3, 4, 2, 1)[i], group_size=sizes[i]) for i, n in enumerate(names)]
    graph, reference = export(
        model, x, Recipe((*steps, Sparsify(names[0], 0.5))), structure, stays_packed=32 * 32 if packed else 1 << 30
    )
    data = packing.pack(graph)
    assert packing.unpack(data) == graph
    with torch.no_grad():
        expected = reference(x).numpy()
    np.testing.assert_allclose(run(graph, x), expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(Simulation(graph)(x[:40]).numpy(), expected[:40], atol=1e-4 * np.abs(expected).max())
    kinds = operators(graph)
    # In blocks of 32: 192 or 32 inputs are whole ones, those of `tokens`' first layer are 12.
    assert kinds.get("MatMulNBits", 0) == (packed and (2 if name == "perceptron" else 1))
    assert not {"Expand", "Reshape", "Slice", "Cast", "Mul"} & set(kinds)


@pytest.mark.parametrize("name", ["perceptron", "tokens"])
def test_layers_that_stay_packed_compute_the_same(name, traced):
    """With and without a bias, BatchNorm's negative factors, tokens, zeros, beside layers of int8 and of float."""
    model, x, structure = traced(name)
    names = [layer.name for layer in structure.layers]
    steps = [Quantize(n, 3 + i % 2) for i, n in enumerate(names)] + [Sparsify(names[1], 0.5)]
    graph, reference = export(model, x, Recipe(tuple(steps)), structure, stays_packed=32 * 32)
    graph = packing.unpack(packing.pack(graph))
    expected = reference(x).detach().numpy()
    kinds = operators(graph)
    assert kinds["MatMulNBits"] == 2
    assert not {"Expand", "Cast"} & set(kinds)
    np.testing.assert_allclose(Simulation(graph)(x[:40]).numpy(), expected[:40], atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(run(graph, x), expected, atol=1e-4 * np.abs(expected).max())
    mixed = [Quantize(names[0], 8, 8), Quantize(names[1], 4), Quantize(names[2], 8, 8)]
    graph, reference = export(model, x, Recipe(tuple(mixed)), structure, stays_packed=32 * 32)
    expected = reference(x).detach().numpy()
    assert operators(graph)["MatMulNBits"] == 1
    assert np.abs(run(graph, x) - expected).mean() < 0.05 * expected.std()


def test_channels_and_blocks_are_really_gone(network):
    model, x = network("residual")
    steps = (Student(("layer1.1",)), Prune("stem", 8), Prune("down", 16), Prune("layer2.0.conv1", 8))
    graph, reference = export(model, x, Recipe((*steps, Quantize("down", 4, 8), Quantize("stem", 3))))
    shapes = {t.name: tuple(t.dims) for t in graph.graph.initializer}
    assert shapes["stem.weight_q"] == (8, 3, 3, 3)
    assert shapes["down.weight_q"] == (16, 8, 3, 3)
    assert shapes["layer1.0.conv2.weight"] == (8, 16, 3, 3)
    assert shapes["layer2.0.conv1.weight"] == (8, 16, 3, 3)
    assert shapes["fc.weight"] == (10, 16)
    assert not any(name.startswith("layer1.1") for name in shapes)
    with torch.no_grad():
        assert np.abs(run(graph, x) - reference(x).numpy()).mean() < 0.05 * float(reference(x).std())


def test_zeroed_weights_are_stored_as_zeros_not_as_minus_zeros(network):
    """0 times a negative factor is -0.0, whose bits are not zero; a bitmap would keep half of the zeros."""
    model, x = network("residual")
    structure = trace(model, x[:66])
    for bits in (32, 16):
        steps = [Sparsify(layer.name, 0.7) for layer in structure.layers]
        steps += [Quantize(layer.name, bits) for layer in structure.layers if bits < 32]
        graph, _ = export(model, x, Recipe(tuple(steps)), structure)
        for tensor in graph.graph.initializer:
            if len(tensor.dims) == 4:
                raw = np.frombuffer(tensor.raw_data, np.uint16 if bits == 16 else np.uint32)
                assert (raw == 0).sum() >= round(0.7 * len(raw))


def deadened(settle):
    """A network with channels of zero and of next to no weights, whose biases matter all the more."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 6), nn.Flatten()
    )
    model, x = settle(model, (3, 8, 8))
    with torch.no_grad():
        model[1].bias[2:6] = torch.tensor([1.0, 2.0, 3.0, 1.5])
        model[1].weight[2], model[1].weight[3] = 0, -0.7
        model[0].weight[4] = 0
        model[0].weight[5] *= 1e-9
    return model.eval(), x


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("activations", [8, 32])
def test_a_dead_channel_keeps_its_bias(bits, activations, settle):
    """Its weight scale is next to zero, and so would be the steps of its int32 bias."""
    model, x = deadened(settle)
    graph, reference = export(model, x, Recipe((Quantize("0", bits, activations), Quantize("3", 8, activations))))
    with torch.no_grad():
        expected = reference(x).numpy()
    assert np.abs(run(graph, x) - expected).mean() < (0.1 if activations == 8 else 1e-4) * expected.std()


def test_dead_inputs_do_not_break_a_layer(settle):
    """A ReLU that never opens on the calibration inputs gives a range of zero."""
    model, x = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 6), nn.Flatten()), (3, 8, 8))
    with torch.no_grad():
        model[0].bias[:] = -100
        model[2].bias[:] = torch.randn(10)
    graph, reference = export(model, x, Recipe((Quantize("0", 8, 8), Quantize("2", 8, 8))))
    np.testing.assert_allclose(run(graph, x), reference(x).detach().numpy(), atol=0.02)


@pytest.mark.parametrize("kind", ["conv", "tokens"])
def test_layers_of_equal_weights_stay_layers_of_their_own(kind):
    """Exporters store equal tensors once."""
    torch.manual_seed(0)
    if kind == "conv":
        first, second = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        model, shape = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(4, 5, 8), nn.Flatten()), (4, 8, 8)
    else:
        first, second = nn.Linear(8, 8), nn.Linear(8, 8)
        model, shape = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)), (3, 8)
    second.load_state_dict(first.state_dict())
    x = torch.randn(64, *shape)
    for bits in ((4, 4), (4, 8), (8, 2)):
        for activations in (8, 32):
            recipe = Recipe((Quantize("0", bits[0], activations), Quantize("2", bits[1], 32)))
            graph, reference = export(model.eval(), x, recipe)
            stored = {t.name: t for t in graph.graph.initializer}
            for name, width in zip(("0", "2"), bits, strict=True):
                assert packing.width(numpy_helper.to_array(stored[f"{name}.weight_q"]).astype(np.int8)) == width
            expected = reference(x).detach().numpy()
            assert np.abs(run(graph, x) - expected).mean() < (0.03 if activations == 8 else 1e-5) * expected.std()


class Last(nn.Module):
    """Ends in a convolution, in one with a ReLU, or in a linear layer without a bias over tokens."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a, self.b = (
            (nn.Linear(12, 16), nn.Linear(16, 10, bias=False))
            if kind == "tokens"
            else (nn.Conv2d(3, 16, 3), nn.Conv2d(16, 10, 6))
        )

    def forward(self, x):
        y = self.b(F.relu(self.a(x)))
        return F.relu(y) if self.kind == "relu" else y


@pytest.mark.parametrize("kind", ["conv", "relu", "tokens"])
def test_a_last_layer_runs_in_int8_too(kind):
    torch.manual_seed(0)
    model, x = Last(kind).eval(), torch.randn(64, *((5, 12) if kind == "tokens" else (3, 8, 8)))
    graph, reference = export(model, x, Recipe((Quantize("a", 8, 8), Quantize("b", 8, 8))))
    found = operators(graph)
    assert sum(found.get(name, 0) for name in INT8) == 2
    assert not any(found.get(name) for name in FLOAT)
    expected = reference(x).detach().numpy()
    assert [o.name for o in graph.graph.output] == ["output"]
    assert np.abs(run(graph, x) - expected).mean() < 0.05 * expected.std()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Linear(12, 16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.embed(x)
        return self.head((x + self.mix(x, x, x, need_weights=False)[0]).mean(1))


def test_a_network_with_attention_is_exported_around_it(capfd):
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(64, 5, 12)
    fast = torch.backends.mha.get_fastpath_enabled()
    graph, reference = export(model, x, Recipe((Quantize("embed", 8, 8), Quantize("head", 4))))
    assert torch.backends.mha.get_fastpath_enabled() == fast
    expected = reference(x).detach().numpy()
    assert np.abs(run(graph, x) - expected).mean() < 0.05 * expected.std()
    assert capfd.readouterr().out == ""


def test_what_the_older_exporter_cannot_do_is_not_printed(capfd):
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(100, 2)),
        torch.randn(4, 3, 9, 9),
    )
    found = run(export_float(model.eval(), x[:2]), x, (1,))
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert capfd.readouterr() == ("", "")


def test_the_newer_exporter_steps_in_where_the_older_one_fails(monkeypatch, network):
    original = torch.onnx.export

    def export_without_torchscript(*arguments, dynamo, **more):
        if not dynamo:
            raise RuntimeError("no such operator")
        return original(*arguments, dynamo=dynamo, **more)

    monkeypatch.setattr(torch.onnx, "export", export_without_torchscript)
    for name in ("perceptron", "tokens"):
        model, x = network(name)
        structure = trace(model, x[:66])
        steps = [Quantize(layer.name, 8, 8 if i else 32) for i, layer in enumerate(structure.layers)]
        graph, reference = export(model, x, Recipe(tuple(steps)), structure)
        expected = reference(x).detach().numpy()
        assert np.abs(run(graph, x) - expected).mean() < 0.05 * expected.std()
        found = operators(graph)
        assert sum(found.get(kind, 0) for kind in INT8) == len(steps) - 1


def test_what_cannot_be_exported_is_said_in_one_error(monkeypatch, network):
    def fail(*arguments, dynamo, **more):
        raise RuntimeError("second" if dynamo else "no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    model, x = network("perceptron")
    with pytest.raises(ExportFailed, match="cannot be exported to ONNX: RuntimeError: no such operator"):
        export_float(model, x[:2])


def test_a_model_that_the_runtime_refuses_is_an_export_error(network):
    model, x = network("perceptron")
    graph = export_float(model, x[:2])
    graph.graph.node[0].op_type = "Nonsense"
    with pytest.raises(ExportFailed, match="cannot load"):
        session(graph)


def test_nan_on_calibration_inputs_is_an_export_error(network):
    model, x = network("perceptron")
    model[1].bias.data[0] = float("nan")
    live = compress(model, Recipe((Quantize("7", 8, 8),)), trace(network("perceptron")[0], x[:66]), x[:2])
    frozen = freeze(live, Recipe((Quantize("7", 8, 8),)))
    with pytest.raises(ExportFailed, match="NaN"):
        quantized_graph(live, x[:2], frozen, {}, [x[:32]])


def test_the_same_network_gives_the_same_bytes(network):
    model, x = network("residual")
    structure = trace(model, x[:66])
    recipe = Recipe(tuple(plans(structure)["mixed bits"]))
    first, second = (packing.pack(export(model, x, recipe, structure)[0]) for _ in range(2))
    assert first == second


def test_a_batch_is_filled_up_by_repetition():
    x = torch.arange(6.0).view(3, 2)
    assert batch_of(x, 7).tolist() == [*x.tolist(), *x.tolist(), [0.0, 1.0]]
    assert batch_of(x, 2).tolist() == x[:2].tolist()
