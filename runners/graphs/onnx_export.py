"""From a compressed torch network to the ONNX file that ships: export, integer weights, QDQ.

There is no simulation to disagree with: accuracy and latency on the front are those of this file in ONNX Runtime, and
activation ranges are measured on this graph too.

- The float graph comes from torch's TorchScript exporter: 0.1-0.5 s per network, where the newer one (`dynamo=True`)
  takes 3-16 s, which a search would pay in every trial. The newer one steps in where the first fails.
- Weights: 1 and 2 bits are stored as INT2 (ONNX has no narrower type; the packed file does) and 3 or 4 as INT4, both with a Cast to INT8, 5 to 8 bits as INT8; float16 with a
  Cast. ONNX Runtime folds the Cast when it loads the file, so the file is small and runs at full speed. Codebooks are read
  by a Gather, which is folded too. A file with INT2 is of opset 25, all others are of opset 21.
- The scales of groups of a row are spread over the weight (Expand, Reshape), which is folded at loading as well.
- An affine weight has one scale and one zero point, in the signed types too: 0..15 are stored as -8..7, for uint8 by int8 is what runs
  fast. Products take the zero point at no cost; convolutions then run as products (ONNX Runtime's own kernel for them wants a
  zero point of 0) and take 1.2 to 1.8 times as long, in OpenVINO as floats (`benchmarks/affine.py`). Such layers do not stay packed.
- A layer of 8-bit activations becomes QDQ in the one scheme that ONNX Runtime runs fast on x86: uint8 activations,
  int8 weights per channel, int32 bias, and Q/DQ on outputs too, through Add, pooling, Concat and reshapes, so that
  regions stay in int8. A layer of float activations gets its weights as Cast and Mul, folded to floats at loading.
- Activations of 4 and 16 bits are written down in the same way, but with float biases: ONNX Runtime has no kernels for them,
  and computes in floats what lies between (an accelerator may not). `_finish_layer` says how version 1.32 is kept to that. A
  tensor has the width that its widest reader asks for.
- Linear layers over tokens (MatMul, an Add for the bias) are an exception: they read uint8 and write floats, for what reads
  them (LayerNorm, GELU, Softmax, the residual Add) computes in floats. An encoder of 4 x 256 runs 1.1 times as fast
  without Q/DQ between product and bias, in OpenVINO 1.28 times (batch 32: 1.15), at half the error.
- The products of attention (queries by keys, softmax by values) get Q/DQ on both operands only where the target says so
  (`Target.int8_products`) and all layers in front of them run in int8. In OpenVINO it takes the same time to 0.75 of it (64 to
  512 tokens); in ONNX Runtime 0.93 to 1.19 of it. There, too, what linear layers over tokens read is rounded ahead of reshapes,
  so that these move bytes, and to int8 around zero where that costs at most half a bit: the kernels then have no zero point
  to take out again (an encoder: 1.01 to 1.03 times as fast; ONNX Runtime 0.99 at batch 1, 1.03 at 32).
- A linear layer of dynamic activations becomes DynamicQuantizeLinear and MatMulInteger, which ONNX Runtime fuses into one
  kernel that finds the range of its input in each call. All inputs of a call share that range: what a file of such layers
  answers to an input depends, a little, on the others in its batch.
- But for large linear layers of 3 and 4 bits (8 million weights and more, float activations), which become MatMulNBits:
  their weights stay packed in memory and are multiplied as floats (accuracy_level 1), by the same scale per output channel
  in every block. Where weights no longer fit into the caches, reading them is what takes the time: measured on one
  thread, 2.2 to 2.6 times as fast as folded floats at batch 1, 1.1 to 1.3 at 8 and 32, in a fifth of the memory. Below, it
  loses where inputs come in batches (4 million weights: 0.8 to 1.0 at batch 8; 1 million: 0.5), and at 8 and 2 bits it
  loses everywhere (0.03 to 0.6). With accuracy_level 4 it is 2 to 5 times as fast, but rounds its inputs to 8 bits, 3% of
  the outputs' deviation off: not what a recipe with float activations says. `benchmarks/matmulnbits.py` prints the table.
- ONNX Runtime's `WeightBiasQuantization` would quietly turn a float layer between two int8 layers into an int8 one;
  `session_options` turns it off, and so must any other program that runs a mixed file.
"""

from __future__ import annotations

import ctypes
import io
import itertools
import math
import os
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from ...errors import ExportFailed
from ..files.packing import codes_to_nibbles, codes_to_raw
from ..operators.frozen import FrozenWeight
from ..operators.quantize import spread
from ..targets.runtime import DISABLED_OPTIMIZERS as DISABLED_OPTIMIZERS
from ..targets.runtime import session as session
from ..targets.runtime import session_options as session_options

OPSET = 21  # the first with INT4
_OPSET_INT2 = 25  # the first with INT2: only of files that hold one, as an older ONNX Runtime cannot load it
_MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
# Linear layers of at least so many weights stay packed when they run, in blocks of the largest size that fits.
_STAYS_PACKED, _BLOCKS = 1 << 23, (256, 128, 64, 32)
# Operators that hand numbers on unchanged, so that their output has the scale of their input ...
_MOVES = {"MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze"}
# ... and operators that ONNX Runtime computes in int8 with a scale of their own.
_COMPUTES = {"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool"}
_ACTIVATIONS = {"Relu", "Clip"}
_UNSIGNED = {4: TensorProto.UINT4, 8: TensorProto.UINT8, 16: TensorProto.UINT16}
_BIAS_STEPS = 2.0**30  # the largest int32 bias: as much again is left for the sum that it is added to


def export_float(model: nn.Module, example: Tensor) -> onnx.ModelProto:
    """The network as a float ONNX graph with the batch size left open; raises `ExportFailed`."""
    model = model.eval()
    buffer = io.BytesIO()
    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["output"]}
    with warnings.catch_warnings(), _plain_attention(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            # Initializers are inputs too (until `_tidy`), or layers of equal weights would come out as sharing one.
            with _quiet():
                torch.onnx.export(
                    model, (example,), buffer, dynamo=False,  # type: ignore[arg-type]
                    opset_version=20, do_constant_folding=True,
                    dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}}, keep_initializers_as_inputs=True, **names,
                )  # fmt: skip
            graph = onnx.load_from_string(buffer.getvalue())
        except Exception as first:  # the exporter raises whatever fails inside
            try:
                shapes = ({0: torch.export.Dim("batch")},)
                program = torch.onnx.export(
                    model, (example,), dynamo=True, opset_version=OPSET, dynamic_shapes=shapes, verbose=False, **names
                )
                assert program is not None
                graph = program.model_proto
            except Exception as second:
                raise ExportFailed(
                    f"the network cannot be exported to ONNX: {type(first).__name__}: {first}"
                ) from second
    return _tidy(graph)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as single operations: the fused one of evaluation mode cannot be exported."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the pages that the older exporter prints, past Python, of a graph that it cannot convert; the newer one does it then."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph without Identity and Constant nodes, unused tensors, names of nodes, traces of its origin."""
    graph = model.graph
    alias: dict[str, str] = {}
    nodes = []
    outputs = {o.name for o in graph.output}
    for node in graph.node:
        if node.op_type == "Identity" and node.output[0] not in outputs:
            alias[node.output[0]] = alias.get(node.input[0], node.input[0])
        elif node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = node.attribute[0].t
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
        else:
            for i, name in enumerate(node.input):
                node.input[i] = alias.get(name, name)
            node.name = node.doc_string = ""  # its output has a name, and a file is counted in bytes
            del node.metadata_props[:]
            nodes.append(node)
    used = {name for node in nodes for name in node.input}
    initializers = [_without_minus_zero(t) for t in graph.initializer if t.name in used]
    clean = helper.make_graph(nodes, "paretorch", list(graph.input)[:1], list(graph.output), initializers)
    clean.input[0].CopyFrom(
        helper.make_tensor_value_info(graph.input[0].name, TensorProto.FLOAT, _shape(graph.input[0]))
    )
    return _model(clean)


def _number(model: onnx.ModelProto) -> dict[str, str]:
    """Give the exporter's paths (`/layer1/layer1.0/conv1/Conv_output_0`) numbers, in place; what each number stands for.

    With all that is named after them they were a twentieth of a small int8 file. Parameters keep their names.
    """
    graph = model.graph
    names = dict.fromkeys(name for node in graph.node for name in [*node.input, *node.output])
    free = (str(number) for number in itertools.count(1) if str(number) not in names)
    given = {name: next(free) for name in names if name.startswith(("/", "onnx::"))}
    for entry in [*graph.input, *graph.output]:
        given.pop(entry.name, None)
    for node in graph.node:
        node.input[:] = [given.get(name, name) for name in node.input]
        node.output[:] = [given.get(name, name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = given.get(tensor.name, tensor.name)
    return {number: name for name, number in given.items()}


def _without_minus_zero(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """A zeroed weight times a negative one is -0.0, which is no zero in a bitmap of nonzero values."""
    if tensor.data_type != TensorProto.FLOAT:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(0), tensor.name)


def _shape(value: onnx.ValueInfoProto) -> list[Any]:
    dims = value.type.tensor_type.shape.dim
    return ["batch", *(d.dim_value or d.dim_param for d in dims[1:])]


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    opset = _OPSET_INT2 if any(t.data_type == TensorProto.INT2 for t in graph.initializer) else OPSET
    opsets = [helper.make_opsetid("", opset)]
    if any(node.domain == _MICROSOFT for node in graph.node):
        opsets.append(helper.make_opsetid(_MICROSOFT, 1))
    made = helper.make_model(graph, opset_imports=opsets, producer_name="paretorch")
    made.ir_version = 10
    return made


def quantized_graph(
    model: nn.Module,
    example: Tensor,
    frozen: Mapping[str, FrozenWeight],
    factors: Mapping[str, Tensor],
    calibration: Sequence[Tensor],
    int8_products: bool = False,
) -> onnx.ModelProto:
    """The ONNX model that ships.

    model: the compressed network with BatchNorm folded. frozen: by layer the integers and scales of its weights before
    folding. factors: by layer what folding multiplied its output channels by. calibration: batches of inputs that the
    ranges of 8-bit activations are taken from. int8_products: see `Target`. Raises `ExportFailed`.
    """
    float_model = export_float(model, example)
    paths = _number(float_model)
    if not frozen:
        return float_model
    graph = _QuantizedGraph(float_model, paths, calibration)
    for name, weight in frozen.items():
        graph.set_weight(name, model.get_submodule(name), weight, factors.get(name))
    graph.insert_activations(int8_products)
    return graph.finish()


@dataclass
class _Int8Layer:
    """The weight of a layer of integer activations, as the graph holds it: `axis` is the one of the output channels."""

    weight: str
    bits: int
    values: NDArray[np.int8]
    scales: NDArray[np.float32]
    axis: int
    group_size: int = 0  # then scales are `[outputs, groups]`
    zero: int | None = None  # the zero point of an affine weight; then scales are `[1]`
    activations: int = 8  # bits of what the layer reads


class _QuantizedGraph:
    """An ONNX graph under surgery."""

    def __init__(self, model: onnx.ModelProto, paths: Mapping[str, str], calibration: Sequence[Tensor]) -> None:
        self.float_model = model
        self.paths = paths  # what the exporter called a tensor, by its number
        self.calibration = calibration
        self.nodes: list[onnx.NodeProto] = [_copy(node) for node in model.graph.node]
        self.tensors = {t.name: t for t in model.graph.initializer}
        self.outputs = {o.name for o in model.graph.output}
        self.int8: dict[int, _Int8Layer] = {}  # by index of the node
        self.added: list[onnx.NodeProto] = []
        self.changed: set[int] = set()  # nodes that have their new weight

    def readers(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = defaultdict(list)
        for number, node in enumerate(self.nodes):
            for name in node.input:
                found[name].append(number)
        return found

    def makers(self) -> dict[str, int]:
        """By tensor the number of the node that makes it."""
        return {name: number for number, node in enumerate(self.nodes) for name in node.output}

    def _node_of(self, layer: str, module: nn.Module) -> tuple[int, bool]:
        """The node that computes a layer, and whether its weight is transposed there."""
        weight = module.weight.detach().numpy()  # type: ignore[operator,union-attr]
        alike = []
        for number, node in enumerate(self.nodes):
            if node.op_type not in ("Conv", "Gemm", "MatMul") or number in self.changed:
                continue
            tensor = self.tensors.get(node.input[1])
            if tensor is None:
                continue
            if tensor.name == f"{layer}.weight":
                return number, False
            # The exporter renames what it transposes; then the numbers tell, and of equal ones the name of the output.
            if (
                weight.ndim == 2
                and tensor.dims == [*weight.shape[::-1]]
                and np.array_equal(numpy_helper.to_array(tensor), weight.T)
            ):
                alike.append(number)
        scope = layer.rpartition(".")[2]
        outputs = {n: self.nodes[n].output[0] for n in alike}
        named = [n for n, output in outputs.items() if self.paths.get(output, "").split("/")[-2:-1] == [scope]]
        if not alike:
            raise ExportFailed(f"layer {layer!r} cannot be found in the exported graph")
        return (named or alike)[0], True

    def set_weight(self, layer: str, module: nn.Module, weight: FrozenWeight, factor: Tensor | None) -> None:
        """Store a layer's weight as integers (or float16) and note the layer when its activations are 8-bit."""
        number, transposed = self._node_of(layer, module)
        self.changed.add(number)
        node = self.nodes[number]
        old, name = node.input[1], f"{layer}.weight"
        node.input[1] = f"{name}_dq"
        if weight.codebook is not None:
            self._add_codebook(name, weight, factor, transposed)
            return
        if weight.codes is None or weight.scale is None:
            half = numpy_helper.to_array(self.tensors[old]).astype(np.float16)
            self._add_tensor(numpy_helper.from_array(half, f"{name}_f16"))
            self._add("Cast", [f"{name}_f16"], f"{name}_dq", to=TensorProto.FLOAT)
            return
        codes, scale = weight.codes.clone(), weight.scale.clone()
        zero = None if weight.zero is None else weight.zero - (1 << weight.weight_bits - 1)
        if zero is not None:
            if factor is not None and bool(
                factor.any()
            ):  # the same for all channels, those that are switched off aside
                scale *= (factor if weight.factor is None else factor / weight.factor)[factor != 0].median()
            codes = codes * bool(scale >= 1e-12) + zero
        elif factor is not None:
            codes *= torch.where(factor < 0, -1.0, 1.0).view(-1, *[1] * (codes.ndim - 1))
            scale *= factor.abs().view(-1, *[1] * (scale.ndim - 1))
        # A scale of zero (BatchNorm switched a channel off) is not allowed; then every code is zero, but a sign is never.
        if weight.weight_bits > 1 and zero is None:
            codes *= spread(scale, codes, weight.group_size) >= 1e-12
        values = codes.to(torch.int8).numpy()
        scales = scale.clamp_min(1e-12).numpy().astype(np.float32)
        if node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute):
            # ONNX Runtime's int8 Gemm reads weights as [inputs, outputs].
            kept = [a for a in node.attribute if a.name != "transB"]
            del node.attribute[:]
            node.attribute.extend(kept)
            transposed = True
        if transposed:
            values = np.ascontiguousarray(values.T)
        made = _Int8Layer(name, weight.weight_bits, values, scales, int(transposed), weight.group_size, zero)
        if weight.activation_bits == 8 and weight.dynamic:
            self._multiply_dynamic(layer, node, made)
            return
        if weight.activation_bits < 32:
            made.activations = weight.activation_bits
            self.int8[number] = made
            return
        if zero is None and (block := _block(node, made)):
            self._multiply_packed(node, made, block)
            return
        self._add_codes(made)
        if made.group_size:
            self._spread_scales(layer, made)
        else:
            self._add_tensor(numpy_helper.from_array(_along(made, scales), f"{name}_s"))
        self._add("Cast", [f"{name}_q"], f"{name}_c", to=TensorProto.FLOAT)
        counted = f"{name}_c"
        if made.zero is not None:
            counted = f"{name}_n"
            self._add_tensor(numpy_helper.from_array(np.array(made.zero, np.float32), f"{name}_z"))
            self._add("Sub", [f"{name}_c", f"{name}_z"], counted)
        self._add("Mul", [counted, f"{name}_s"], f"{name}_dq")

    def _spread_scales(self, layer: str, made: _Int8Layer) -> None:
        """The scales of groups as large as the weight `[inputs, outputs]`: each repeated, and the last group cut off."""
        if made.values.ndim != 2 or made.axis != 1:
            raise ExportFailed(f"layer {layer!r} is no plain matrix product in the exported graph; choose group_size 0 for it")  # fmt: skip
        name, (inputs, outputs), size = made.weight, made.values.shape, made.group_size
        groups = made.scales.shape[1]
        self._add_tensor(numpy_helper.from_array(np.ascontiguousarray(made.scales.T)[:, None], f"{name}_g"))
        for part, shape in (("n", [groups, size, outputs]), ("m", [groups * size, outputs])):
            self._add_tensor(numpy_helper.from_array(np.array(shape), f"{name}_{part}"))
        self._add("Expand", [f"{name}_g", f"{name}_n"], f"{name}_e")
        whole = inputs == groups * size
        self._add("Reshape", [f"{name}_e", f"{name}_m"], f"{name}_s" if whole else f"{name}_r")
        if not whole:
            for part, value in (("b", 0), ("k", inputs)):
                self._add_tensor(numpy_helper.from_array(np.array([value]), f"{name}_{part}"))
            self._add("Slice", [f"{name}_r", f"{name}_b", f"{name}_k", f"{name}_b"], f"{name}_s")

    def _multiply_dynamic(self, layer: str, node: onnx.NodeProto, made: _Int8Layer) -> None:
        """Turn a linear layer into the nodes that ONNX Runtime fuses into DynamicQuantizeMatMul."""
        if node.op_type == "Conv" or made.axis != made.values.ndim - 1 or not _plain(node):
            raise ExportFailed(f"layer {layer!r} is no plain matrix product in the exported graph; choose static activations for it")  # fmt: skip
        name, output = made.weight, node.output[0]
        source = f"{name}_q"
        if self._add_codes(made) != TensorProto.INT8:
            self._add("Cast", [source], f"{name}_c", to=TensorProto.INT8)
            source = f"{name}_c"
        self._add_tensor(numpy_helper.from_array(made.scales, f"{name}_s"))
        if made.zero is not None:
            self._add_tensor(numpy_helper.from_array(np.array(made.zero, np.int8), f"{name}_z"))
        # Among the nodes of the network, so that it reads what all others read where the layer before is quantized.
        quantize = helper.make_node(
            "DynamicQuantizeLinear", [node.input[0]], [f"{name}_x{part}" for part in ("", "s", "z")]
        )
        self.nodes.append(quantize)
        zero = [] if made.zero is None else [f"{name}_z"]
        self._add("MatMulInteger", [f"{name}_x", source, f"{name}_xz", *zero], f"{name}_i")
        self._add("Cast", [f"{name}_i"], f"{name}_f", to=TensorProto.FLOAT)
        self._add("Mul", [f"{name}_xs", f"{name}_s"], f"{name}_m")
        bias = node.input[2] if len(node.input) > 2 else ""
        if bias:
            self._add("Mul", [f"{name}_f", f"{name}_m"], f"{name}_p")
        last = ("Add", [f"{name}_p", bias]) if bias else ("Mul", [f"{name}_f", f"{name}_m"])
        node.CopyFrom(helper.make_node(*last, [output]))

    def _multiply_packed(self, node: onnx.NodeProto, layer: _Int8Layer, block: int) -> None:
        """Turn a linear layer into MatMulNBits, whose weights are [outputs, blocks, bytes of a block]."""
        inputs, outputs = layer.values.shape
        raw = codes_to_nibbles(np.ascontiguousarray(layer.values.T).reshape(-1))
        weight, scales, shape = (f"{layer.weight}_{part}" for part in ("q", "s", "n"))
        blocks = inputs // block
        dims = [outputs, blocks, block // 2]
        self._add_tensor(helper.make_tensor(weight, TensorProto.UINT8, dims, raw, raw=True))
        if layer.group_size:
            self._add_tensor(numpy_helper.from_array(layer.scales, f"{scales}_all"))
        else:
            self._add_tensor(numpy_helper.from_array(layer.scales[:, None], scales))
            self._add_tensor(numpy_helper.from_array(np.array([outputs, blocks]), shape))
            self._add("Expand", [scales, shape], f"{scales}_all")  # folded at loading: a scale per channel in the file
        bias = ["", "", node.input[2]] if len(node.input) > 2 else []
        new = helper.make_node("MatMulNBits", [node.input[0], weight, f"{scales}_all", *bias], list(node.output),
                               domain=_MICROSOFT, K=inputs, N=outputs, bits=4, block_size=block, accuracy_level=1)  # fmt: skip
        node.CopyFrom(new)

    def _add_codebook(self, name: str, weight: FrozenWeight, factor: Tensor | None, transposed: bool) -> None:
        """A weight as indices, which ONNX Runtime looks up when it loads the file, and what folding multiplied it by.

        ONNX counts a negative index from the end of the codebook. So the upper half of the indices is written as
        negative numbers, and all of them fit into the signed types that weights have anyway.
        """
        assert weight.codes is not None
        assert weight.codebook is not None
        size = len(weight.codebook)
        indices = torch.where(weight.codes >= (size + 1) // 2, weight.codes - size, weight.codes).to(torch.int8).numpy()
        indices = np.ascontiguousarray(indices.T) if transposed else indices
        made = _Int8Layer(name, weight.weight_bits, indices, np.ones(0, np.float32), int(transposed))
        self._add_codes(made)
        self._add_tensor(numpy_helper.from_array(weight.codebook.numpy().astype(np.float32), f"{name}_b"))
        self._add("Cast", [f"{name}_q"], f"{name}_c", to=TensorProto.INT32)
        self._add("Gather", [f"{name}_b", f"{name}_c"], f"{name}_dq" if factor is None else f"{name}_v")
        if factor is not None:
            self._add_tensor(numpy_helper.from_array(_along(made, factor.numpy().astype(np.float32)), f"{name}_s"))
            self._add("Mul", [f"{name}_v", f"{name}_s"], f"{name}_dq")

    def _add_codes(self, layer: _Int8Layer) -> TensorProto.DataType:
        kind = TensorProto.INT8 if layer.bits > 4 else TensorProto.INT4 if layer.bits > 2 else TensorProto.INT2
        raw = codes_to_raw(layer.values.reshape(-1), kind)
        self._add_tensor(helper.make_tensor(f"{layer.weight}_q", kind, layer.values.shape, raw, raw=True))
        return kind

    def _add_tensor(self, tensor: onnx.TensorProto) -> None:
        self.tensors[tensor.name] = tensor

    def _add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.added.append(helper.make_node(kind, inputs, [output], **attributes))

    def _after_activation(self, name: str, readers: Mapping[str, list[int]]) -> str:
        """The tensor behind a Relu or Clip that is the only reader of `name`; ONNX Runtime merges the two."""
        found = readers.get(name, [])
        if len(found) == 1 and name not in self.outputs and self.nodes[found[0]].op_type in _ACTIVATIONS:
            return str(self.nodes[found[0]].output[0])
        return name

    def insert_activations(self, products: bool = False) -> None:
        """Q and DQ on every tensor that an int8 layer reads or writes and wherever they keep a region in int8."""
        if not self.int8:
            return
        readers, makers = self.readers(), self.makers()
        moves = _MOVES | {"Gather"} if products else _MOVES
        tokens: set[str] = set()  # what linear layers over tokens read, before all moves
        wanted: dict[str, str] = {}  # tensor -> the tensor whose range it shares
        final: set[str] = set()  # outputs of the graph that an int8 kernel writes
        reads: dict[str, int] = {}  # the bits that the layers ask for that read a tensor, and have that write it
        writes: dict[str, int] = {}
        for number, layer in self.int8.items():
            node = self.nodes[number]
            source = node.input[0]
            if node.op_type == "MatMul" and products:
                source = self._before(moves, source, readers, makers)
            wanted.setdefault(source, source)
            reads[source] = max(reads.get(source, 0), layer.activations)
            if node.op_type == "MatMul":
                tokens.add(wanted[source])
                continue
            after = self._after_activation(node.output[0], readers)
            if after not in self.outputs or node.op_type != "Gemm":  # only QGemm can write floats
                wanted.setdefault(after, after)
                writes[after] = layer.activations
                final |= {after} & self.outputs
        for node in self.nodes:
            data = [name for name in node.input[: 1 if node.op_type in moves else None] if name]
            if node.op_type in moves | _COMPUTES and all(name in wanted for name in data):
                after = self._after_activation(node.output[0], readers)
                if after not in self.outputs:
                    share = wanted[data[0]] if node.op_type in moves and after == node.output[0] else after
                    wanted[after] = share
                    writes.setdefault(after, max(reads.get(name, writes.get(name, 8)) for name in data))
        factors = {name for node in self._int8_products() for name in node.input} if products else set()
        signed = factors - set(wanted)
        wanted |= {name: name for name in sorted(signed)}
        ranges = self._ranges(sorted(set(wanted.values())))
        widths: dict[str, int] = {}
        for name, source in wanted.items():
            widths[source] = max(widths.get(source, 0), reads.get(name, 0))
        widths = {source: width or writes.get(source, 8) for source, width in widths.items()}
        signed |= {name for name in tokens if products and widths[name] == 8 and _even(*ranges[name])}
        for name, source in wanted.items():
            kind, scale, zero = _grid(*ranges[source], widths[source], signed=source in signed)
            self._add_tensor(numpy_helper.from_array(np.array(scale, np.float32), f"{name}_scale"))
            raw = zero.to_bytes(2 if kind == TensorProto.UINT16 else 1, "little")
            self._add_tensor(helper.make_tensor(f"{name}_zero", kind, [], raw, raw=True))
            before, after = (f"{name}_float", name) if name in final else (name, f"{name}_dq")
            if kind == TensorProto.UINT4:
                before = self._unclipped(before, makers, scale * -zero, scale * (15 - zero))
            self._add("QuantizeLinear", [before, f"{name}_scale", f"{name}_zero"], f"{name}_q8")
            self._add("DequantizeLinear", [f"{name}_q8", f"{name}_scale", f"{name}_zero"], after)
        for number, layer in self.int8.items():
            self._finish_layer(self.nodes[number], layer)
        for node in self.nodes:
            node.input[:] = [f"{name}_dq" if name in wanted and name not in final else name for name in node.input]
            node.output[:] = [f"{name}_float" if name in final else name for name in node.output]

    def _before(
        self, moves: Collection[str], name: str, readers: Mapping[str, list[int]], makers: Mapping[str, int]
    ) -> str:
        """The tensor that a chain of moves begins with, each of them the only reader of what it moves."""
        while (
            name in makers and (node := self.nodes[makers[name]]).op_type in moves and len(readers[node.input[0]]) == 1
        ):
            name = node.input[0]
        return name

    def _unclipped(self, name: str, makers: Mapping[str, int], low: float, high: float) -> str:
        """What a Clip reads that cuts off nothing inside the range: ONNX Runtime cannot load one ahead of 4 bits."""
        if name not in makers or (clip := self.nodes[makers[name]]).op_type != "Clip":
            return name
        given = [self.tensors.get(bound) for bound in [*clip.input, "", ""][1:3]]
        least, most = (None if tensor is None else float(numpy_helper.to_array(tensor)) for tensor in given)
        close = 1e-6 * (high - low)
        inside = (least is None or least <= low + close) and (most is None or most >= high - close)
        return str(clip.input[0]) if inside else name

    def _int8_products(self) -> list[onnx.NodeProto]:
        """Products of two activations in front of which all layers, up to the nearest ones, run in int8."""
        maker = self.makers()
        kinds = ("Conv", "Gemm", "MatMul", "MatMulNBits")
        layers = {n for n, node in enumerate(self.nodes) if node.op_type in kinds and (n in self.changed or node.input[1] in self.tensors)}  # fmt: skip

        def behind(node: onnx.NodeProto) -> set[int]:
            found, waiting = set(), list(node.input)
            while waiting:
                number = maker.get(waiting.pop(), -1)
                if number >= 0 and number not in found:
                    found.add(number)
                    waiting += [] if number in layers else self.nodes[number].input
            return found & layers

        eight = {number for number, layer in self.int8.items() if layer.activations == 8}
        products = (n for n in self.nodes if n.op_type == "MatMul" and all(name in maker for name in n.input))
        return [node for node in products if (before := behind(node)) and before <= eight]

    def _finish_layer(self, node: onnx.NodeProto, layer: _Int8Layer) -> None:
        """The weight and the bias of an int8 layer, the bias in steps of input scale x weight scale.

        A channel of tiny weights has steps too small for its bias to fit into int32 (one whose weights are all zero
        always has); it takes the smallest scale that fits, at which its weights round to what they still amount to. Signs
        stay: of any input they make less than inputs x 255 / 2^30 of that bias, where a step of the output is 1/255 of it.
        Where activations have another width than 8 bits the bias stays float.
        """
        inputs = node.input[0]
        input_scale = numpy_helper.to_array(self.tensors[f"{inputs}_scale"])
        eight = self.tensors[f"{inputs}_zero"].data_type in (TensorProto.UINT8, TensorProto.INT8)
        whole = eight and len(node.input) > 2
        bias = numpy_helper.to_array(self.tensors[node.input[2]]) if whole else np.zeros(1)
        least = (np.abs(bias) / (_BIAS_STEPS * input_scale)).astype(np.float32)
        scales = np.maximum(layer.scales, least if layer.zero is None else least.max())
        if layer.bits > 1:
            zero = layer.zero or 0
            layer.values = (np.rint((layer.values.astype(np.int32) - zero) * _along(layer, layer.scales / scales)) + zero).astype(np.int8)  # fmt: skip
        kind = self._add_codes(layer)
        source, name = f"{layer.weight}_q", layer.weight
        if kind != TensorProto.INT8:
            self._add("Cast", [source], f"{name}_c", to=TensorProto.INT8)
            source = f"{name}_c"
        zeros = np.zeros(len(scales), np.int8)
        # ONNX Runtime 1.32 makes MatMulNBits of a product and the DequantizeLinear of its weight, which rounds activations of
        # any width to 8 bits. It does not where the axis is counted from behind, or the one scale for all is in a row.
        axis = {"axis": layer.axis if eight or node.op_type == "Conv" else layer.axis - layer.values.ndim}
        if layer.zero is not None:
            axis, shape = {}, () if eight else (1,)
            scales, zeros = scales.reshape(shape), np.full(shape, layer.zero, np.int8)
        self._add_tensor(numpy_helper.from_array(scales, f"{name}_s"))
        self._add_tensor(numpy_helper.from_array(zeros, f"{name}_z"))
        self._add("DequantizeLinear", [source, f"{name}_s", f"{name}_z"], f"{name}_dq", **axis)
        if whole:
            steps = np.rint(bias.astype(np.float64) / (input_scale * scales)).astype(np.int32)
            base = f"{node.output[0]}_bias"
            self._add_tensor(numpy_helper.from_array(steps, f"{base}_q"))
            # The product is folded at loading: a scale per channel less in the file.
            self._add("Mul", [f"{inputs}_scale", f"{name}_s"], f"{base}_s")
            self._add("DequantizeLinear", [f"{base}_q", f"{base}_s"], base, **({"axis": 0} if axis else {}))
            node.input[2] = base

    def _ranges(self, names: Sequence[str]) -> dict[str, tuple[float, float]]:
        """The range of each tensor: the mean over the batches of their minima and maxima (Jacob et al. 2018).

        The reductions are part of the graph, so that only two numbers per tensor and batch leave the runtime.
        """
        # The weights are the quantized ones already: the recipe's network is what the ranges must fit.
        probe = self._probe(names)
        runner = session(probe, threads=max(1, torch.get_num_threads()))
        lows, highs = [], []
        outputs = [f"{name}_{which}" for which in ("min", "max") for name in names]
        for batch in self.calibration:
            found = np.array(runner.run(outputs, {probe.graph.input[0].name: batch.numpy()}), dtype=np.float64)
            lows.append(found[: len(names)])
            highs.append(found[len(names) :])
        low, high = np.mean(lows, 0), np.mean(highs, 0)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ExportFailed("the compressed network gives NaN or infinity on the calibration inputs")
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}

    def _probe(self, names: Sequence[str]) -> onnx.ModelProto:
        probe = onnx.ModelProto()
        probe.CopyFrom(self.float_model)
        for name in names:
            for which in ("min", "max"):
                kind = f"Reduce{which.capitalize()}"
                probe.graph.node.append(helper.make_node(kind, [name], [f"{name}_{which}"], keepdims=0))
                probe.graph.output.append(helper.make_tensor_value_info(f"{name}_{which}", TensorProto.FLOAT, []))
        return probe

    def finish(self) -> onnx.ModelProto:
        """The edited graph in topological order, checked."""
        graph = self.float_model.graph
        nodes = _sorted([*self.added, *self.nodes], {*self.tensors, *(i.name for i in graph.input)})
        used = {name for node in nodes for name in node.input}
        nodes = [node for node in nodes if used.union(self.outputs).intersection(node.output)]
        used = {name for node in nodes for name in node.input}
        tensors = [tensor for name, tensor in self.tensors.items() if name in used]
        model = _model(helper.make_graph(nodes, "paretorch", list(graph.input), list(graph.output), tensors))
        try:
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError as error:
            raise ExportFailed(f"the exported graph is not valid ONNX: {error}") from error
        return model


def _grid(low: float, high: float, bits: int, signed: bool) -> tuple[int, float, int]:
    """Type, scale and zero point of a range: unsigned, or int8 around zero where `signed` and there are negative numbers.

    OpenVINO's kernels for products of activations know no zero point; with one they compute in floats.

    >>> kind, scale, zero = _grid(-1.0, 14.0, 4, signed=False)
    >>> TensorProto.DataType.Name(kind), scale, zero
    ('UINT4', 1.0, 1)
    """
    low, high = min(0.0, low), max(0.0, high)
    if signed and low < 0:
        return TensorProto.INT8, max(max(-low, high) / 127.0, 1e-8), 0
    most = 2**bits - 1
    scale = max((high - low) / most, 1e-8)
    return _UNSIGNED[bits], scale, int(np.clip(round(-low / scale), 0, most))


def _even(low: float, high: float) -> bool:
    """Whether steps around zero are at most half a bit coarser than those of the range itself.

    >>> _even(-1.0, 2.0), _even(-0.2, 5.0)
    (True, False)
    """
    return 2 * max(-low, high) < math.sqrt(2) * (high - low)


def _block(node: onnx.NodeProto, layer: _Int8Layer) -> int:
    """The block size with which a layer of float activations runs as MatMulNBits, or 0 where it does not."""
    if layer.bits not in (3, 4) or layer.values.size < _STAYS_PACKED or node.op_type == "Conv" or layer.axis != 1:
        return 0
    if not _plain(node):
        return 0
    sizes = (layer.group_size,) if layer.group_size else _BLOCKS
    return next((size for size in sizes if layer.values.shape[0] % size == 0), 0)


def _plain(node: onnx.NodeProto) -> bool:
    """Whether a Gemm (whose weight is not transposed any more) or MatMul is nothing but a product and a bias."""
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    return all(helper.get_attribute_value(a) == plain.get(a.name) for a in node.attribute)


def _along(layer: _Int8Layer, scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """One number per output channel, in the shape that broadcasts over the layer's weight."""
    shape = [1] * layer.values.ndim
    shape[layer.axis] = -1
    return scales.reshape(shape)


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _sorted(nodes: Sequence[onnx.NodeProto], known: set[str]) -> list[onnx.NodeProto]:
    """Nodes in an order in which each comes after those that it reads, otherwise as given."""
    maker = {output: number for number, node in enumerate(nodes) for output in node.output}
    done: set[int] = set()
    order: list[onnx.NodeProto] = []
    for start in range(len(nodes)):
        stack = [start]
        while stack:
            number = stack[-1]
            waiting = [
                maker[name]
                for name in nodes[number].input
                if name in maker and name not in known and maker[name] not in done
            ]
            if waiting and number not in done:
                stack += waiting
                continue
            stack.pop()
            if number not in done:
                done.add(number)
                order.append(nodes[number])
    return order


def operators(model: onnx.ModelProto | bytes, threads: int = 1) -> dict[str, int]:
    """How often each operator runs after ONNX Runtime's own optimisation: what a file really runs as."""
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads)
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        data = model if isinstance(model, bytes) else model.SerializeToString()
        ort.InferenceSession(data, options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED_OPTIMIZERS)
        found: dict[str, int] = defaultdict(int)
        for node in onnx.load(options.optimized_model_filepath).graph.node:
            found[node.op_type] += 1
    return dict(found)


def batch_of(inputs: Tensor, size: int) -> NDArray[np.float32]:
    """`size` rows of the inputs, repeated when there are fewer."""
    repeated = inputs.repeat(math.ceil(size / len(inputs)), *[1] * (inputs.ndim - 1))
    return repeated[:size].contiguous().numpy()
