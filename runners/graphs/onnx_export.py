"""From a compressed torch network to the ONNX file that ships: where its activations are rounded.

There is no simulation to disagree with: accuracy and latency on the front are those of this file in ONNX Runtime, and
activation ranges are measured on this graph too. `float_graph` exports the network, `quantized_weights` stores its
weights, `ranges` measures its activations; here Quantize and Dequantize (Q/DQ) are placed.

- A layer of 8-bit activations becomes QDQ in the one scheme that ONNX Runtime runs fast on x86: uint8 activations,
  int8 weights per channel, int32 bias, and Q/DQ on outputs too, through Add, pooling, Concat and reshapes, so that
  regions stay in int8.
- Activations of 4 and 16 bits are written down in the same way, but with float biases: ONNX Runtime has no kernels
  for them, and computes in floats what lies between (an accelerator may not). `_finish_layer` says how version 1.32
  is kept to that. A tensor has the width that its widest reader asks for.
- Linear layers over tokens (MatMul, an Add for the bias) are an exception: they read uint8 and write floats, for what
  reads them (LayerNorm, GELU, Softmax, the residual Add) computes in floats. An encoder of 4 x 256 runs 1.1 times as
  fast without Q/DQ between product and bias, in OpenVINO 1.28 times (batch 32: 1.15), at half the error.
- The products of attention (queries by keys, softmax by values) get Q/DQ on both operands only where the target says
  so (`Target.int8_products`) and all layers in front of them run in int8. In OpenVINO it takes the same time to 0.75
  of it (64 to 512 tokens); in ONNX Runtime 0.93 to 1.19 of it. There, too, what linear layers over tokens read is
  rounded ahead of reshapes, so that these move bytes, and to int8 around zero where that costs at most half a bit:
  the kernels then have no zero point to take out again (an encoder: 1.01 to 1.03 times as fast; ONNX Runtime 0.99 at
  batch 1, 1.03 at 32).
- ONNX Runtime's `WeightBiasQuantization` would quietly turn a float layer between two int8 layers into an int8 one;
  `session_options` turns it off, and so must any other program that runs a mixed file.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from ..operators.frozen import FrozenWeight
from ..operators.layers import ONNX
from ..targets.runtime import DISABLED_OPTIMIZERS, session_options
from .float_graph import export_float, number_tensors
from .nodes import EditedGraph
from .quantized_weights import STAYS_PACKED, QuantizedLayer, add_codes, along_outputs, bias_input, node_of, write_weight
from .ranges import activation_ranges, even, grid

# Operators that hand numbers on unchanged, so that their output has the scale of their input ...
_MOVES = {"MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze"}
# ... and operators that ONNX Runtime computes in int8 with a scale of their own.
_COMPUTES = {"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool"}
_ACTIVATIONS = {"Relu", "Clip"}
_BIAS_STEPS = 2.0**30  # the largest int32 bias: as much again is left for the sum that it is added to


def quantized_graph(
    model: nn.Module,
    example: Tensor,
    frozen: Mapping[str, FrozenWeight],
    factors: Mapping[str, Tensor],
    calibration: Sequence[Tensor],
    int8_products: bool = False,
    stays_packed: int = STAYS_PACKED,
) -> onnx.ModelProto:
    """The ONNX model that ships.

    Args:
        model: The compressed network with BatchNorm folded.
        example: A few inputs.
        frozen: By layer the integers and scales of its weights before folding.
        factors: By layer what folding multiplied its output channels by.
        calibration: Batches of inputs on which the ranges of activations are measured.
        int8_products: See `Target`.
        stays_packed: Linear layers of 3 and 4 bits with at least so many weights stay packed when they run.

    Raises:
        ExportFailed: The network cannot be exported, or gives NaN or infinity on the calibration inputs.
    """
    float_model = export_float(model, example)
    paths = number_tensors(float_model)
    if not frozen:
        return float_model
    graph = EditedGraph(float_model)
    layers: dict[int, QuantizedLayer] = {}
    written: set[int] = set()
    for name, weight in frozen.items():
        number = node_of(graph, name, model.get_submodule(name), paths, written)
        written.add(number)
        layer = write_weight(graph, number, name, weight, factors.get(name), stays_packed)
        if layer is not None:
            layers[number] = layer
    if layers:
        plan = _plan(graph, layers, written, int8_products)
        _insert(graph, plan, calibration, int8_products)
        for number, layer in layers.items():
            _finish_layer(graph, graph.nodes[number], layer)
        _rename(graph, plan)
    return graph.finish()


@dataclass
class _Plan:
    """Which tensors get Q and DQ, all before a node is changed.

    sources: by tensor the one whose range it shares. final: outputs of the graph that an int8 kernel writes. reads,
    writes: the bits that the layers ask for that read a tensor, and have that write it. tokens: what linear layers
    over tokens read, before all moves. factors: the operands of products of two activations that nothing else gives Q
    and DQ.
    """

    sources: dict[str, str] = field(default_factory=dict)
    final: set[str] = field(default_factory=set)
    reads: dict[str, int] = field(default_factory=dict)
    writes: dict[str, int] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    factors: set[str] = field(default_factory=set)

    def widths(self) -> dict[str, int]:
        """By tensor that gives a range, the bits of the widest reader among all that share it."""
        asked: dict[str, int] = {}
        for name, source in self.sources.items():
            asked[source] = max(asked.get(source, 0), self.reads.get(name, 0))
        return {source: bits or self.writes.get(source, 8) for source, bits in asked.items()}


def _plan(graph: EditedGraph, layers: Mapping[int, QuantizedLayer], written: Collection[int], products: bool) -> _Plan:
    """Q and DQ on every tensor that an int8 layer reads or writes and wherever they keep a region in int8."""
    plan, readers = _Plan(), graph.readers()
    moves = _MOVES | {"Gather"} if products else _MOVES
    _around_layers(graph, layers, plan, readers, moves if products else ())
    for node in graph.nodes:
        if node.op_type not in moves | _COMPUTES:
            continue
        data = [name for name in node.input[: 1 if node.op_type in moves else None] if name]
        if not all(name in plan.sources for name in data):
            continue
        after = _after_activation(graph, node.output[0], readers)
        if after not in graph.outputs:
            moved = node.op_type in moves and after == node.output[0]
            plan.sources[after] = plan.sources[data[0]] if moved else after
            bits = (plan.reads.get(name, plan.writes.get(name, 8)) for name in data)
            plan.writes.setdefault(after, max(bits))
    if products:
        operands = {name for node in _int8_products(graph, layers, written) for name in node.input}
        plan.factors = operands - set(plan.sources)
        plan.sources |= {name: name for name in sorted(plan.factors)}
    return plan


def _around_layers(
    graph: EditedGraph,
    layers: Mapping[int, QuantizedLayer],
    plan: _Plan,
    readers: Mapping[str, list[int]],
    moves: Collection[str],
) -> None:
    """What the layers themselves read and write; ahead of `moves` what linear layers over tokens read is rounded."""
    makers = graph.makers()
    for number, layer in layers.items():
        node = graph.nodes[number]
        over_tokens = node.op_type == "MatMul"
        source = _before(graph, moves, node.input[0], readers, makers) if over_tokens else node.input[0]
        plan.sources.setdefault(source, source)
        plan.reads[source] = max(plan.reads.get(source, 0), layer.activations)
        if over_tokens:
            plan.tokens.add(plan.sources[source])
            continue
        after = _after_activation(graph, node.output[0], readers)
        if after not in graph.outputs or node.op_type != "Gemm":  # only QGemm can write floats
            plan.sources.setdefault(after, after)
            plan.writes[after] = layer.activations
            plan.final |= {after} & graph.outputs


def _insert(graph: EditedGraph, plan: _Plan, calibration: Sequence[Tensor], products: bool) -> None:
    """Put the planned Q and DQ into the graph."""
    makers, widths = graph.makers(), plan.widths()
    ranges = activation_ranges(graph.model, sorted(set(plan.sources.values())), calibration)
    around_zero = plan.factors | {n for n in plan.tokens if products and widths[n] == 8 and even(*ranges[n])}
    for name, source in plan.sources.items():
        kind, scale, zero = grid(*ranges[source], widths[source], signed=source in around_zero)
        graph.add_tensor(numpy_helper.from_array(np.array(scale, np.float32), f"{name}_scale"))
        raw = zero.to_bytes(2 if kind == TensorProto.UINT16 else 1, "little")
        graph.add_tensor(helper.make_tensor(f"{name}_zero", kind, [], raw, raw=True))
        before, after = (f"{name}_float", name) if name in plan.final else (name, f"{name}_dq")
        if kind == TensorProto.UINT4:
            before = _unclipped(graph, before, makers, scale * -zero, scale * (15 - zero))
        graph.add_node("QuantizeLinear", [before, f"{name}_scale", f"{name}_zero"], f"{name}_q8")
        graph.add_node("DequantizeLinear", [f"{name}_q8", f"{name}_scale", f"{name}_zero"], after)


def _rename(graph: EditedGraph, plan: _Plan) -> None:
    """Let all nodes read what comes out of the Dequantize."""
    for node in graph.nodes:
        node.input[:] = [f"{n}_dq" if n in plan.sources and n not in plan.final else n for n in node.input]
        node.output[:] = [f"{n}_float" if n in plan.final else n for n in node.output]


def _after_activation(graph: EditedGraph, name: str, readers: Mapping[str, list[int]]) -> str:
    """The tensor behind a Relu or Clip that is the only reader of `name`; ONNX Runtime merges the two."""
    behind = readers.get(name, [])
    if len(behind) == 1 and name not in graph.outputs and graph.nodes[behind[0]].op_type in _ACTIVATIONS:
        return str(graph.nodes[behind[0]].output[0])
    return name


def _before(
    graph: EditedGraph,
    moves: Collection[str],
    name: str,
    readers: Mapping[str, list[int]],
    makers: Mapping[str, int],
) -> str:
    """The tensor that a chain of moves begins with, each of them the only reader of what it moves."""
    while name in makers and (node := graph.nodes[makers[name]]).op_type in moves and len(readers[node.input[0]]) == 1:
        name = node.input[0]
    return name


def _unclipped(graph: EditedGraph, name: str, makers: Mapping[str, int], low: float, high: float) -> str:
    """What a Clip reads that cuts off nothing inside the range: ONNX Runtime cannot load one ahead of 4 bits."""
    if name not in makers or (clip := graph.nodes[makers[name]]).op_type != "Clip":
        return name
    given = [graph.tensors.get(bound) for bound in [*clip.input, "", ""][1:3]]
    least, most = (None if tensor is None else float(numpy_helper.to_array(tensor)) for tensor in given)
    close = 1e-6 * (high - low)
    inside = (least is None or least <= low + close) and (most is None or most >= high - close)
    return str(clip.input[0]) if inside else name


def _int8_products(
    graph: EditedGraph, layers: Mapping[int, QuantizedLayer], written: Collection[int]
) -> list[onnx.NodeProto]:
    """Products of two activations in front of which all layers, up to the nearest ones, run in int8."""
    maker = graph.makers()
    weights = {operator.name: operator.weight for operator in ONNX.values()} | {"MatMulNBits": 1}
    with_weights = {
        number
        for number, node in enumerate(graph.nodes)
        if node.op_type in weights and (number in written or node.input[weights[node.op_type]] in graph.tensors)
    }

    def behind(node: onnx.NodeProto) -> set[int]:
        seen, waiting = set(), list(node.input)
        while waiting:
            number = maker.get(waiting.pop(), -1)
            if number >= 0 and number not in seen:
                seen.add(number)
                waiting += [] if number in with_weights else graph.nodes[number].input
        return seen & with_weights

    eight = {number for number, layer in layers.items() if layer.activations == 8}
    products = (n for n in graph.nodes if n.op_type == "MatMul" and all(name in maker for name in n.input))
    return [node for node in products if (before := behind(node)) and before <= eight]


def _finish_layer(graph: EditedGraph, node: onnx.NodeProto, layer: QuantizedLayer) -> None:
    """The weight and the bias of an int8 layer, the bias in steps of input scale x weight scale.

    A channel of tiny weights has steps too small for its bias to fit into int32 (one whose weights are all zero
    always has); it takes the smallest scale that fits, at which its weights round to what they still amount to. Signs
    stay: of any input they make less than inputs x 255 / 2^30 of that bias, where a step of the output is 1/255 of it.
    Where activations have another width than 8 bits the bias stays float.
    """
    inputs = node.input[0]
    input_scale = numpy_helper.to_array(graph.tensors[f"{inputs}_scale"])
    eight = graph.tensors[f"{inputs}_zero"].data_type in (TensorProto.UINT8, TensorProto.INT8)
    whole = eight and bool(bias_input(node))
    bias = numpy_helper.to_array(graph.tensors[bias_input(node)]) if whole else np.zeros(1)
    least = (np.abs(bias) / (_BIAS_STEPS * input_scale)).astype(np.float32)
    scales = np.maximum(layer.scales, least if layer.zero is None else least.max())
    if layer.bits > 1:
        zero = layer.zero or 0
        counted = layer.values.astype(np.int32) - zero
        layer.values = (np.rint(counted * along_outputs(layer, layer.scales / scales)) + zero).astype(np.int8)
    kind = add_codes(graph, layer)
    source, name = f"{layer.weight}_q", layer.weight
    if kind != TensorProto.INT8:
        graph.add_node("Cast", [source], f"{name}_c", to=TensorProto.INT8)
        source = f"{name}_c"
    zeros = np.zeros(len(scales), np.int8)
    # ONNX Runtime 1.32 makes MatMulNBits of a product and the DequantizeLinear of its weight, which rounds activations
    # of any width to 8 bits. It does not where the axis is counted from behind, or the one scale for all is in a row.
    axis = {"axis": layer.axis if eight or not ONNX[node.op_type].product else layer.axis - layer.values.ndim}
    if layer.zero is not None:
        axis, shape = {}, () if eight else (1,)
        scales, zeros = scales.reshape(shape), np.full(shape, layer.zero, np.int8)
    graph.add_tensor(numpy_helper.from_array(scales, f"{name}_s"))
    graph.add_tensor(numpy_helper.from_array(zeros, f"{name}_z"))
    graph.add_node("DequantizeLinear", [source, f"{name}_s", f"{name}_z"], f"{name}_dq", **axis)
    if whole:
        steps = np.rint(bias.astype(np.float64) / (input_scale * scales)).astype(np.int32)
        base = f"{node.output[0]}_bias"
        graph.add_tensor(numpy_helper.from_array(steps, f"{base}_q"))
        # The product is folded at loading: a scale per channel less in the file.
        graph.add_node("Mul", [f"{inputs}_scale", f"{name}_s"], f"{base}_s")
        graph.add_node("DequantizeLinear", [f"{base}_q", f"{base}_s"], base, **({"axis": 0} if axis else {}))
        node.input[ONNX[node.op_type].bias] = base


def operators(model: onnx.ModelProto | bytes, threads: int = 1) -> dict[str, int]:
    """How often each operator runs after ONNX Runtime's own optimization: what a file really runs as."""
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads)
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        data = model if isinstance(model, bytes) else model.SerializeToString()
        ort.InferenceSession(data, options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED_OPTIMIZERS)
        counts: dict[str, int] = defaultdict(int)
        for node in onnx.load(options.optimized_model_filepath).graph.node:
            counts[node.op_type] += 1
    return dict(counts)


def batch_of(inputs: Tensor, size: int) -> NDArray[np.float32]:
    """`size` rows of the inputs, repeated when there are fewer."""
    repeated = inputs.repeat(math.ceil(size / len(inputs)), *[1] * (inputs.ndim - 1))
    return repeated[:size].contiguous().numpy()
