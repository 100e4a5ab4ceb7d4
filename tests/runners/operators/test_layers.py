"""Each kind of layer against torch itself, and that no other module knows one."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from onnx import helper
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import paretorch
from paretorch.runners.graphs.float_graph import export_float
from paretorch.runners.operators import layers
from paretorch.runners.operators.layers import (
    CONVOLUTION,
    FUNCTIONS,
    KINDS,
    LINEAR,
    ONNX,
    as_matrix,
    bias_of,
    channels_last,
    channels_of,
    from_matrix,
    groups_of,
    is_layer,
    kind_of,
    output_first,
    parameter_of,
    patches,
    per_channel,
    per_output,
    replace_bias,
    replace_weight,
    row_shape,
    rows,
    set_weight,
    weight_of,
)

# By name: how it is made, the shape of inputs, its kind, and its MACs for one sample, counted by hand:
# weights of one output x outputs.
LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 5, stride=2, padding=2), (3, 4, 20), "conv", 4 * 5 * (6 * 10)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (5, 4, 8, 8), "conv", 4 * 9 * (6 * 64)),
    "uneven": (
        lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (4, 3, 9, 8), "conv",
        3 * 6 * (5 * 5 * 6),
    ),
    "same": (
        lambda: nn.Conv2d(3, 4, 4, padding="same", padding_mode="reflect"), (3, 3, 7, 7), "conv", 3 * 16 * (4 * 49)
    ),
    "grouped": (lambda: nn.Conv2d(6, 9, 3, groups=3, bias=False), (4, 6, 6, 6), "grouped", 2 * 9 * (9 * 16)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6), (4, 6, 6, 6), "depthwise", 1 * 9 * (12 * 36)),
    "linear": (lambda: nn.Linear(7, 5), (4, 7), "linear", 7 * 5),
    "tokens": (lambda: nn.Linear(6, 4, bias=False), (3, 5, 6), "linear", 6 * (5 * 4)),
}  # fmt: skip  # one layer an entry


@pytest.fixture(params=LAYERS)
def case(request):
    """`(layer, inputs, kind, MACs)`."""
    torch.manual_seed(0)
    make, shape, kind, macs = LAYERS[request.param]
    return make().eval().requires_grad_(False), torch.randn(shape), kind, macs


def test_every_kind_and_every_class_has_an_example():
    made = [make() for make, *_ in LAYERS.values()]
    assert {id(kind_of(layer)) for layer in made} == {id(kind) for kind in KINDS}
    assert {type(layer) for layer in made} == {one for kind in KINDS for one in kind.types}


def test_what_it_is(case):
    layer, x, kind, _ = case
    assert is_layer(layer)
    assert kind_of(layer).name(layer) == kind
    assert channels_of(layer) == (channels_last(layer, x).shape[-1], channels_last(layer, layer(x)).shape[-1])
    assert bias_of(layer) is layer.bias
    assert parameter_of(layer) is layer.weight


def test_what_is_no_layer():
    for module in (nn.BatchNorm2d(3), nn.Embedding(3, 4), nn.ConvTranspose2d(3, 4, 2), nn.ReLU()):
        assert not is_layer(module)
        with pytest.raises(TypeError, match=f"{type(module).__name__} is no layer; layers: Conv1d, Conv2d, Linear"):
            kind_of(module)


def test_a_subclass_is_of_the_kind_of_its_base():
    """torch makes one of a layer whose weight is parametrized, and has one for the projection of an attention."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    assert type(layer) is not nn.Linear
    assert kind_of(layer) is LINEAR
    assert kind_of(nn.MultiheadAttention(4, 2).out_proj) is LINEAR


def test_patches_times_the_weight_is_the_output(case):
    layer, x, *_ = case
    y = layer(x)
    product = (as_matrix(weight_of(layer), groups_of(layer)) @ patches(layer, x)).flatten(0, 1)
    found = channels_last(layer, y).flatten(0, -2).T if kind_of(layer) is LINEAR else y.transpose(0, 1).flatten(1)
    bias = 0 if layer.bias is None else layer.bias[:, None]
    torch.testing.assert_close(product + bias, found, rtol=1e-4, atol=1e-5)


def test_macs_are_those_counted_by_hand(case):
    layer, x, _, macs = case
    assert kind_of(layer).macs(layer, x.shape, layer(x).shape) == macs
    few = x[:2]
    assert kind_of(layer).macs(layer, few.shape, layer(few).shape) == macs


def test_a_matrix_is_the_weight_again(case):
    layer, *_ = case
    weight = weight_of(layer)
    assert torch.equal(from_matrix(as_matrix(weight, groups_of(layer)), weight.shape), weight)
    assert torch.equal(rows(weight), as_matrix(weight, groups_of(layer)).flatten(0, 1))
    channels, positions = row_shape(weight)
    assert rows(weight).shape == (channels_of(layer)[1], channels * positions)
    assert channels == channels_of(layer)[0] // groups_of(layer)


def test_numbers_of_channels_are_laid_along_them(case):
    layer, x, *_ = case
    factor = torch.rand(channels_of(layer)[1]) + 0.5
    expected = layer(x) * per_channel(layer, factor, layer(x))
    set_weight(layer, weight_of(layer) * per_output(factor, weight_of(layer)))
    if layer.bias is not None:
        replace_bias(layer, layer.bias * factor)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_a_weight_is_written_in_place_or_replaced(case):
    layer, *_ = case
    before, wanted = layer.weight, torch.randn_like(weight_of(layer))
    set_weight(layer, wanted)
    assert layer.weight is before
    assert torch.equal(weight_of(layer), wanted)
    replace_weight(layer, 2 * wanted)
    assert layer.weight is not before
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(weight_of(layer), 2 * wanted)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_kind_may_store_its_inputs_first(groups):
    """As a transposed convolution does: `[inputs, outputs of a group, kernel]`. It is computed here by its weight
    output-first.
    """
    kind = replace(CONVOLUTION, types=(nn.ConvTranspose2d,), output_axis=1, input_axis=0)
    torch.manual_seed(0)
    layer, x = nn.ConvTranspose2d(6, 9, 3, groups=groups, bias=False).requires_grad_(False), torch.randn(2, 6, 5, 5)
    weight = kind.output_first(layer.weight, groups)
    assert weight.shape == (9, 6 // groups, 3, 3)
    torch.testing.assert_close(F.conv2d(x, weight.flip(2, 3), padding=2, groups=groups), layer(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(kind.stored(weight, groups), layer.weight)


def test_what_has_the_shape_of_a_weight_goes_the_same_way(monkeypatch):
    """A gradient; with a table that stores linear layers the other way round, as transformers' Conv1D does."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), None

    kind = replace(LINEAR, types=(Turned,), output_axis=1, input_axis=0, channels=lambda layer: (4, 3))
    monkeypatch.setattr(layers, "KINDS", (kind,))
    layer = Turned().requires_grad_(False)
    assert torch.equal(weight_of(layer), layer.weight.T)
    assert torch.equal(output_first(layer, 2 * layer.weight), 2 * layer.weight.T)
    wanted = torch.randn(3, 4)
    set_weight(layer, wanted)
    assert torch.equal(layer.weight, wanted.T)


def test_the_function_that_computes_it_is_known(case):
    layer, x, *_ = case
    seen = set()

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.add(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    with Recorder():
        layer(x)
    assert seen & set(kind_of(layer).functions)
    assert set(kind_of(layer).functions) <= FUNCTIONS


def test_the_operator_that_it_is_exported_as_is_known(case):
    """Where the weight is in the node, along which axis its outputs are, and along which the result's channels."""
    layer, x, *_ = case
    graph = export_float(nn.Sequential(layer), x).graph
    (node,) = (node for node in graph.node if node.op_type in ONNX)
    operator = ONNX[node.op_type]
    assert operator in kind_of(layer).onnx
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    weight, outputs = shapes[node.input[operator.weight]], channels_of(layer)[1]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert weight[operator.output_axis(attributes, len(weight))] == outputs
    assert layer(x).shape[operator.channel_axis] == outputs
    if operator.bias is not None and layer.bias is not None:
        assert shapes[node.input[operator.bias]] == [outputs]


def test_the_weight_of_gemm_may_be_turned_over():
    gemm = ONNX["Gemm"]
    assert [gemm.output_axis({"transB": flag}, 2) for flag in (0, 1)] == [1, 0]
    assert ONNX["MatMul"].output_axis({}, 2) == 1
    assert ONNX["Conv"].output_axis({"transB": 1}, 4) == 0


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "uneven", "same", "linear", "tokens"])
def test_two_layers_may_stand_for_one(name):
    """At full rank they compute the same, whatever stride, padding and dilation."""
    make, shape, *_ = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make().requires_grad_(False), torch.randn(shape)
    matrix = rows(weight_of(layer))
    rank = min(matrix.shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    first, second = kind_of(layer).factors(layer, rank)
    assert bias_of(first) is None
    replace_weight(first, right.view(weight_of(first).shape))
    replace_weight(second, (left * values).view(weight_of(second).shape))
    replace_bias(second, bias_of(layer))
    torch.testing.assert_close(second(first(x)), layer(x), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------ no other module knows a layer

RUNNERS = Path(paretorch.__file__).parent / "runners"
TABLE = "operators/layers.py"
CREATORS = {
    "operators/attention.py": "the projections of an attention become linear layers",
    "check_target.py": "the network that a target is tried on",
}
MODULES = {str(path.relative_to(RUNNERS)): path for path in sorted(RUNNERS.rglob("*.py"))}


def named_layers(source: str) -> tuple[list[int], list[int]]:
    """The lines of a module that create a layer, and those that name a layer class for anything else."""
    tree = ast.parse(source)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "torch.nn"
        for alias in node.names
        if is_layer_class(alias.name)
    }
    created, other = [], []
    for node in ast.walk(tree):
        attribute = isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "nn"
        if (attribute and is_layer_class(node.attr)) or (isinstance(node, ast.Name) and node.id in imported):
            (created if id(node) in called else other).append(node.lineno)
    return sorted(created), sorted(other)


def is_layer_class(name: str) -> bool:
    """Those of the table, and those that may become entries of it."""
    return name.startswith(("Conv", "LazyConv", "Linear", "LazyLinear", "Bilinear", "Embedding", "LSTM", "GRU", "RNN"))


def test_a_layer_that_is_named_is_seen():
    """The check below stands on this reading."""
    source = (
        "from torch import nn\nfrom torch.nn import Linear as L\na = nn.Linear(1, 2)\nb = isinstance(a, "
        "nn.Conv2d)\nc = L\n"
    )
    assert named_layers(source) == ([3], [4, 5])
    assert named_layers(MODULES[TABLE].read_text())[1]


@pytest.mark.parametrize("module", sorted(set(MODULES) - {TABLE}))
def test_no_other_module_tests_for_a_kind_of_layer(module):
    created, other = named_layers(MODULES[module].read_text())
    assert not other, f"{module}, lines {other}: ask runners/operators/layers.py instead"
    assert bool(created) == (module in CREATORS), f"{module} creates layers in lines {created}"
