"""A compressed layer's weight as an ONNX graph holds it: integers, scales, and the nodes that make floats of them.

- 1 and 2 bits are stored as INT2 (ONNX has no narrower type; the packed file does) and 3 or 4 as INT4, both with a
  Cast to INT8, 5 to 8 bits as INT8; float16 with a Cast. ONNX Runtime folds the Cast when it loads the file, so the
  file is small and runs at full speed. Codebooks are read by a Gather, which is folded too. A file with INT2 is of
  opset 25, all others are of opset 21.
- The scales of groups of a row are spread over the weight (Expand, Reshape), which is folded at loading as well.
- An affine weight has one scale and one zero point, in the signed types too: 0..15 are stored as -8..7, for uint8 by
  int8 is what runs fast. Products take the zero point at no cost; convolutions then run as products (ONNX Runtime's
  own kernel for them wants a zero point of 0) and take 1.2 to 1.8 times as long, in OpenVINO as floats
  (`benchmarks/affine.py`). Such layers do not stay packed.
- A layer of float activations gets its weight as Cast and Mul, folded to floats at loading.
- A linear layer of dynamic activations becomes DynamicQuantizeLinear and MatMulInteger, which ONNX Runtime fuses into
  one kernel that finds the range of its input in each call. All inputs of a call share that range: what a file of
  such layers answers to an input depends, a little, on the others in its batch.
- Large linear layers of 3 and 4 bits (8 million weights and more, float activations) become MatMulNBits: their
  weights stay packed in memory and are multiplied as floats (accuracy_level 1), by the same scale per output channel
  in every block. Where weights no longer fit into the caches, reading them is what takes the time: measured on one
  thread, 2.2 to 2.6 times as fast as folded floats at batch 1, 1.1 to 1.3 at 8 and 32, in a fifth of the memory.
  Below, it loses where inputs come in batches (4 million weights: 0.8 to 1.0 at batch 8; 1 million: 0.5), and at 8
  and 2 bits it loses everywhere (0.03 to 0.6). With accuracy_level 4 it is 2 to 5 times as fast, but rounds its
  inputs to 8 bits, 3% of the outputs' deviation off: not what a recipe with float activations says.
  `benchmarks/matmulnbits.py` prints the table.
- A layer of static integer activations is finished by `onnx_export`, which knows the scale of its input.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from ...errors import ExportFailed
from ..files.packing import codes_to_nibbles, codes_to_raw
from ..operators.frozen import FrozenWeight
from ..operators.layers import ONNX, kind_of, parameter_of, per_output
from ..operators.quantize import spread
from .nodes import MICROSOFT, EditedGraph

# Linear layers of at least so many weights stay packed when they run, in blocks of the largest size that fits.
STAYS_PACKED, _BLOCKS = 1 << 23, (256, 128, 64, 32)


@dataclass
class QuantizedLayer:
    """The integers of a layer's weight as the graph holds them.

    Attributes:
        weight: The name of the tensor that they stand for.
        bits: Their width.
        values: The integers, in the node's order of axes.
        scales: `[outputs]`, `[outputs, groups]` with a `group_size`, or `[1]` with a zero point.
        axis: The axis of the output channels in `values`.
        group_size: How many weights of a row share a scale; 0 for all of them.
        zero: The zero point of an affine weight, or None.
        activations: The bits of what the layer reads.
    """

    weight: str
    bits: int
    values: NDArray[np.int8]
    scales: NDArray[np.float32]
    axis: int
    group_size: int = 0
    zero: int | None = None
    activations: int = 32


def node_of(
    graph: EditedGraph, layer: str, module: nn.Module, paths: Mapping[str, str], taken: Collection[int] = ()
) -> int:
    """The number of the node that computes a layer.

    Args:
        graph: The exported graph.
        layer: The layer's name.
        module: The layer.
        paths: What the exporter called a tensor, by its name in the graph.
        taken: Nodes that compute other layers.

    Raises:
        ExportFailed: There is no such node.
    """
    weight = parameter_of(module).detach().numpy()
    operators = {operator.name: operator for operator in kind_of(module).onnx}
    alike = []
    for number, node in enumerate(graph.nodes):
        if node.op_type not in operators or number in taken:
            continue
        tensor = graph.tensors.get(node.input[operators[node.op_type].weight])
        if tensor is None:
            continue
        if tensor.name == f"{layer}.weight":
            return number
        # The exporter renames what it transposes; then the numbers tell, and of equal ones the name of the output.
        if (
            weight.ndim == 2
            and tensor.dims == [*weight.shape[::-1]]
            and np.array_equal(numpy_helper.to_array(tensor), weight.T)
        ):
            alike.append(number)
    if not alike:
        raise ExportFailed(f"layer {layer!r} cannot be found in the exported graph")
    scope = layer.rpartition(".")[2]
    outputs = {n: graph.nodes[n].output[0] for n in alike}
    named = [n for n, output in outputs.items() if paths.get(output, "").split("/")[-2:-1] == [scope]]
    return (named or alike)[0]


def write_weight(
    graph: EditedGraph,
    number: int,
    layer: str,
    weight: FrozenWeight,
    factor: Tensor | None,
    stays_packed: int = STAYS_PACKED,
) -> QuantizedLayer | None:
    """Store a layer's weight as integers (or float16) in the place of its floats.

    Args:
        graph: The graph, changed in place.
        number: The number of the layer's node.
        layer: The layer's name.
        weight: The weight before folding.
        factor: What folding multiplied its output channels by, or None.
        stays_packed: See `onnx_export.quantized_graph`.

    Returns:
        The layer where its activations are static integers, whose weight is not in the graph yet; else None.
    """
    node = graph.nodes[number]
    place, name = ONNX[node.op_type].weight, f"{layer}.weight"
    old = node.input[place]
    node.input[place] = f"{name}_dq"
    if weight.codebook is not None:
        _add_codebook(graph, node, name, weight, factor)
        return None
    if weight.codes is None or weight.scale is None:
        half = numpy_helper.to_array(graph.tensors[old]).astype(np.float16)
        graph.add_tensor(numpy_helper.from_array(half, f"{name}_f16"))
        graph.add_node("Cast", [f"{name}_f16"], f"{name}_dq", to=TensorProto.FLOAT)
        return None
    codes, scale, zero = _folded(weight, factor)
    _transpose_weight(node)
    values, axis = _as_in_node(node, codes.to(torch.int8).numpy())
    scales = scale.clamp_min(1e-12).numpy().astype(np.float32)
    made = QuantizedLayer(
        name, weight.weight_bits, values, scales, axis, weight.group_size, zero, weight.activation_bits
    )
    if weight.activation_bits == 8 and weight.dynamic:
        _multiply_dynamic(graph, layer, node, made)
    elif weight.activation_bits < 32:
        return made
    elif zero is None and (block := _block(node, made, stays_packed)):
        _multiply_packed(graph, node, made, block)
    else:
        _add_floats(graph, layer, made)
    return None


def _folded(weight: FrozenWeight, factor: Tensor | None) -> tuple[Tensor, Tensor, int | None]:
    """`(codes, scale, zero point)` after folding, codes and zero point as the signed types hold them."""
    assert weight.codes is not None
    assert weight.scale is not None
    codes, scale = weight.codes.clone(), weight.scale.clone()
    if weight.zero is not None:
        zero = weight.zero - (1 << weight.weight_bits - 1)
        # The same for all channels, those that are switched off aside.
        if factor is not None and bool(factor.any()):
            scale *= (factor if weight.factor is None else factor / weight.factor)[factor != 0].median()
        return codes * bool(scale >= 1e-12) + zero, scale, zero
    if factor is not None:
        codes *= per_output(torch.where(factor < 0, -1.0, 1.0), codes)
        scale *= per_output(factor.abs(), scale)
    # A scale of zero (BatchNorm switched a channel off) is not allowed; then every code is zero, but a sign is never.
    if weight.weight_bits > 1:
        codes *= spread(scale, codes, weight.group_size) >= 1e-12
    return codes, scale, None


def _transpose_weight(node: onnx.NodeProto) -> None:
    """Let a node read its weight as `[inputs, outputs]`, which ONNX Runtime's int8 Gemm wants."""
    kept = [a for a in node.attribute if not (a.name == ONNX[node.op_type].transposed_by and a.i)]
    if len(kept) < len(node.attribute):
        del node.attribute[:]
        node.attribute.extend(kept)


def _as_in_node(node: onnx.NodeProto, values: NDArray[np.int8]) -> tuple[NDArray[np.int8], int]:
    """An output-first weight as the node reads it, and the axis of the output channels there."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    axis = ONNX[node.op_type].output_axis(attributes, values.ndim)
    return np.ascontiguousarray(np.moveaxis(values, 0, axis)), axis


def _add_floats(graph: EditedGraph, layer: str, made: QuantizedLayer) -> None:
    """A weight as integers that are made floats when the file is loaded."""
    name = made.weight
    add_codes(graph, made)
    if made.group_size:
        _spread_scales(graph, layer, made)
    else:
        graph.add_tensor(numpy_helper.from_array(along_outputs(made, made.scales), f"{name}_s"))
    graph.add_node("Cast", [f"{name}_q"], f"{name}_c", to=TensorProto.FLOAT)
    counted = f"{name}_c"
    if made.zero is not None:
        counted = f"{name}_n"
        graph.add_tensor(numpy_helper.from_array(np.array(made.zero, np.float32), f"{name}_z"))
        graph.add_node("Sub", [f"{name}_c", f"{name}_z"], counted)
    graph.add_node("Mul", [counted, f"{name}_s"], f"{name}_dq")


def _spread_scales(graph: EditedGraph, layer: str, made: QuantizedLayer) -> None:
    """The scales of groups as large as the weight `[inputs, outputs]`: each repeated, and the last group cut off."""
    if made.values.ndim != 2 or made.axis != 1:
        raise ExportFailed(
            f"layer {layer!r} is no plain matrix product in the exported graph; choose group_size 0 for it"
        )
    name, (inputs, outputs), size = made.weight, made.values.shape, made.group_size
    groups = made.scales.shape[1]
    graph.add_tensor(numpy_helper.from_array(np.ascontiguousarray(made.scales.T)[:, None], f"{name}_g"))
    for part, shape in (("n", [groups, size, outputs]), ("m", [groups * size, outputs])):
        graph.add_tensor(numpy_helper.from_array(np.array(shape), f"{name}_{part}"))
    graph.add_node("Expand", [f"{name}_g", f"{name}_n"], f"{name}_e")
    whole = inputs == groups * size
    graph.add_node("Reshape", [f"{name}_e", f"{name}_m"], f"{name}_s" if whole else f"{name}_r")
    if not whole:
        for part, value in (("b", 0), ("k", inputs)):
            graph.add_tensor(numpy_helper.from_array(np.array([value]), f"{name}_{part}"))
        graph.add_node("Slice", [f"{name}_r", f"{name}_b", f"{name}_k", f"{name}_b"], f"{name}_s")


def _multiply_dynamic(graph: EditedGraph, layer: str, node: onnx.NodeProto, made: QuantizedLayer) -> None:
    """Turn a linear layer into the nodes that ONNX Runtime fuses into DynamicQuantizeMatMul."""
    if made.axis != made.values.ndim - 1 or not _plain(node):
        raise ExportFailed(
            f"layer {layer!r} is no plain matrix product in the exported graph; choose static activations for it"
        )
    name, output = made.weight, node.output[0]
    source = f"{name}_q"
    if add_codes(graph, made) != TensorProto.INT8:
        graph.add_node("Cast", [source], f"{name}_c", to=TensorProto.INT8)
        source = f"{name}_c"
    graph.add_tensor(numpy_helper.from_array(made.scales, f"{name}_s"))
    if made.zero is not None:
        graph.add_tensor(numpy_helper.from_array(np.array(made.zero, np.int8), f"{name}_z"))
    # Among the nodes of the network, so that it reads what all others read where the layer before is quantized.
    quantize = helper.make_node(
        "DynamicQuantizeLinear", [node.input[0]], [f"{name}_x{part}" for part in ("", "s", "z")]
    )
    graph.nodes.append(quantize)
    zero = [] if made.zero is None else [f"{name}_z"]
    graph.add_node("MatMulInteger", [f"{name}_x", source, f"{name}_xz", *zero], f"{name}_i")
    graph.add_node("Cast", [f"{name}_i"], f"{name}_f", to=TensorProto.FLOAT)
    graph.add_node("Mul", [f"{name}_xs", f"{name}_s"], f"{name}_m")
    bias = bias_input(node)
    if bias:
        graph.add_node("Mul", [f"{name}_f", f"{name}_m"], f"{name}_p")
    last = ("Add", [f"{name}_p", bias]) if bias else ("Mul", [f"{name}_f", f"{name}_m"])
    node.CopyFrom(helper.make_node(*last, [output]))


def _multiply_packed(graph: EditedGraph, node: onnx.NodeProto, layer: QuantizedLayer, block: int) -> None:
    """Turn a linear layer into MatMulNBits, whose weights are [outputs, blocks, bytes of a block]."""
    inputs, outputs = layer.values.shape
    raw = codes_to_nibbles(np.ascontiguousarray(layer.values.T).reshape(-1))
    weight, scales, shape = (f"{layer.weight}_{part}" for part in ("q", "s", "n"))
    blocks = inputs // block
    dims = [outputs, blocks, block // 2]
    graph.add_tensor(helper.make_tensor(weight, TensorProto.UINT8, dims, raw, raw=True))
    if layer.group_size:
        graph.add_tensor(numpy_helper.from_array(layer.scales, f"{scales}_all"))
    else:
        graph.add_tensor(numpy_helper.from_array(layer.scales[:, None], scales))
        graph.add_tensor(numpy_helper.from_array(np.array([outputs, blocks]), shape))
        graph.add_node("Expand", [scales, shape], f"{scales}_all")  # folded at loading: a scale per channel in the file
    bias = ["", "", name] if (name := bias_input(node)) else []
    attributes = {"K": inputs, "N": outputs, "bits": 4, "block_size": block, "accuracy_level": 1}
    given = [node.input[0], weight, f"{scales}_all", *bias]
    new = helper.make_node("MatMulNBits", given, list(node.output), domain=MICROSOFT, **attributes)
    node.CopyFrom(new)


def _add_codebook(
    graph: EditedGraph, node: onnx.NodeProto, name: str, weight: FrozenWeight, factor: Tensor | None
) -> None:
    """A weight as indices, which ONNX Runtime looks up when it loads the file, and what folding multiplied it by.

    ONNX counts a negative index from the end of the codebook. So the upper half of the indices is written as
    negative numbers, and all of them fit into the signed types that weights have anyway.
    """
    assert weight.codes is not None
    assert weight.codebook is not None
    size = len(weight.codebook)
    indices = torch.where(weight.codes >= (size + 1) // 2, weight.codes - size, weight.codes).to(torch.int8).numpy()
    indices, axis = _as_in_node(node, indices)
    made = QuantizedLayer(name, weight.weight_bits, indices, np.ones(0, np.float32), axis)
    add_codes(graph, made)
    graph.add_tensor(numpy_helper.from_array(weight.codebook.numpy().astype(np.float32), f"{name}_b"))
    graph.add_node("Cast", [f"{name}_q"], f"{name}_c", to=TensorProto.INT32)
    graph.add_node("Gather", [f"{name}_b", f"{name}_c"], f"{name}_dq" if factor is None else f"{name}_v")
    if factor is not None:
        graph.add_tensor(numpy_helper.from_array(along_outputs(made, factor.numpy().astype(np.float32)), f"{name}_s"))
        graph.add_node("Mul", [f"{name}_v", f"{name}_s"], f"{name}_dq")


def add_codes(graph: EditedGraph, layer: QuantizedLayer) -> TensorProto.DataType:
    """Store the integers of a weight as the tensor `<weight>_q`, and say in which type."""
    kind = TensorProto.INT8 if layer.bits > 4 else TensorProto.INT4 if layer.bits > 2 else TensorProto.INT2
    raw = codes_to_raw(layer.values.reshape(-1), kind)
    graph.add_tensor(helper.make_tensor(f"{layer.weight}_q", kind, layer.values.shape, raw, raw=True))
    return kind


def bias_input(node: onnx.NodeProto) -> str:
    """The bias that a layer's node reads, "" for none."""
    place = ONNX[node.op_type].bias
    return str(node.input[place]) if place is not None and len(node.input) > place else ""


def _block(node: onnx.NodeProto, layer: QuantizedLayer, stays_packed: int) -> int:
    """The block size with which a layer of float activations runs as MatMulNBits, or 0 where it does not."""
    if layer.bits not in (3, 4) or layer.values.size < stays_packed or layer.axis != 1:
        return 0
    if not _plain(node):
        return 0
    sizes = (layer.group_size,) if layer.group_size else _BLOCKS
    return next((size for size in sizes if layer.values.shape[0] % size == 0), 0)


def _plain(node: onnx.NodeProto) -> bool:
    """Whether a node is nothing but a matrix product and a bias."""
    if not ONNX[node.op_type].product:
        return False
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    return all(helper.get_attribute_value(a) == plain.get(a.name) for a in node.attribute)


def along_outputs(layer: QuantizedLayer, scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """One number per output channel, in the shape that broadcasts over the layer's weight."""
    shape = [1] * layer.values.ndim
    shape[layer.axis] = -1
    return scales.reshape(shape)
