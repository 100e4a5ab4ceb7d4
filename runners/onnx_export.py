"""From a compressed torch network to the ONNX file that ships: export, integer weights, QDQ.

There is no simulation to disagree with: accuracy and latency on the front are those of this file in ONNX Runtime, and
activation ranges are measured on this graph too.

- The float graph comes from torch's TorchScript exporter: 0.1-0.5 s per network, where the newer one (`dynamo=True`)
  takes 3-16 s, which a search would pay in every trial. The newer one steps in where the first fails.
- Weights: at most 4 bits are stored as INT4 with a Cast to INT8, 5 to 8 bits as INT8; float16 with a Cast. ONNX Runtime
  folds the Cast when it loads the file, so the file is small and runs at full speed.
- A layer of 8-bit activations becomes QDQ in the one scheme that ONNX Runtime runs fast on x86: uint8 activations,
  int8 weights per channel, int32 bias, and Q/DQ on outputs too, through Add, pooling, Concat and reshapes, so that
  regions stay in int8. A layer of float activations gets its weights as Cast and Mul, folded to floats at loading.
- ONNX Runtime's `WeightBiasQuantization` would quietly turn a float layer between two int8 layers into an int8 one;
  `session_options` turns it off, and so must any other program that runs a mixed file.
"""

from __future__ import annotations

import io
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from ..errors import ExportFailed
from .compress import FrozenWeight
from .packing import codes_to_raw

OPSET = 21  # the first with INT4
DISABLED_OPTIMIZERS = ["WeightBiasQuantization"]
# Operators that hand numbers on unchanged, so that their output has the scale of their input ...
_MOVES = {"MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze"}
# ... and operators that ONNX Runtime computes in int8 with a scale of their own.
_COMPUTES = {"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool"}
_ACTIVATIONS = {"Relu", "Clip"}


def session_options(threads: int) -> ort.SessionOptions:
    """How every session here runs: fixed threads, no spinning, and errors only in the log."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def session(model: onnx.ModelProto | bytes, threads: int = 1) -> ort.InferenceSession:
    """A CPU session; raises `ExportFailed` when ONNX Runtime refuses the model."""
    data = model if isinstance(model, bytes) else model.SerializeToString()
    try:
        return ort.InferenceSession(
            data, session_options(threads), providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED_OPTIMIZERS
        )
    except Exception as error:  # ONNX Runtime raises a class per status, without a common base but this
        raise ExportFailed(f"ONNX Runtime cannot load the exported network: {error}") from error


def export_float(model: nn.Module, example: Tensor) -> onnx.ModelProto:
    """The network as a float ONNX graph with the batch size left open; raises `ExportFailed`."""
    model = model.eval()
    buffer = io.BytesIO()
    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["output"]}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                model, (example,), buffer, dynamo=False, opset_version=20, do_constant_folding=True,
                dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}}, **names,
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


def _tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph without Identity and Constant nodes, unused tensors, traces of its origin; opset and IR set."""
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
            node.doc_string = ""
            del node.metadata_props[:]
            nodes.append(node)
    used = {name for node in nodes for name in node.input}
    initializers = [t for t in graph.initializer if t.name in used]
    clean = helper.make_graph(nodes, "paretorch", list(graph.input), list(graph.output), initializers)
    clean.input[0].CopyFrom(
        helper.make_tensor_value_info(graph.input[0].name, TensorProto.FLOAT, _shape(graph.input[0]))
    )
    return _model(clean)


def _shape(value: onnx.ValueInfoProto) -> list[Any]:
    dims = value.type.tensor_type.shape.dim
    return ["batch", *(d.dim_value or d.dim_param for d in dims[1:])]


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="paretorch")
    made.ir_version = 10
    return made


def quantized_graph(
    model: nn.Module,
    example: Tensor,
    frozen: Mapping[str, FrozenWeight],
    factors: Mapping[str, Tensor],
    calibration: Sequence[Tensor],
) -> onnx.ModelProto:
    """The ONNX model that ships.

    model: the compressed network with BatchNorm folded. frozen: by layer the integers and scales of its weights before
    folding. factors: by layer what folding multiplied its output channels by. calibration: batches of inputs that the
    ranges of 8-bit activations are taken from. Raises `ExportFailed`.
    """
    float_model = export_float(model, example)
    if not frozen:
        return float_model
    graph = _Graph(float_model)
    graph.ranges_of(lambda: calibration)
    for name, weight in frozen.items():
        graph.set_weight(name, model.get_submodule(name), weight, factors.get(name))
    graph.insert_activations()
    return graph.finish()


class _Graph:
    """An ONNX graph under surgery."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.float_model = model
        self.nodes: list[onnx.NodeProto] = [_copy(node) for node in model.graph.node]
        self.tensors = {t.name: t for t in model.graph.initializer}
        self.outputs = {o.name for o in model.graph.output}
        self.int8: dict[int, tuple[FrozenWeight, NDArray[np.float32]]] = {}  # by index of the node
        self.added: list[onnx.NodeProto] = []

    def ranges_of(self, calibration: Callable[[], Sequence[Tensor]]) -> None:
        self.calibration = calibration

    def readers(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = defaultdict(list)
        for number, node in enumerate(self.nodes):
            for name in node.input:
                found[name].append(number)
        return found

    def _node_of(self, layer: str, module: nn.Module) -> tuple[int, str, bool]:
        """The node that computes a layer, the name of its weight there, and whether the weight is transposed."""
        weight = module.weight.detach().numpy()  # type: ignore[operator,union-attr]
        for number, node in enumerate(self.nodes):
            if (
                node.op_type not in ("Conv", "Gemm", "MatMul")
                or len(node.input) < 2
                or node.input[1] not in self.tensors
            ):
                continue
            tensor = self.tensors[node.input[1]]
            if tensor.name == f"{layer}.weight":
                return number, tensor.name, False
            # The exporter renames what it folds or transposes; then the numbers tell.
            if (
                tensor.dims == [*weight.shape[::-1]]
                and weight.ndim == 2
                and np.array_equal(numpy_helper.to_array(tensor), weight.T)
            ):
                return number, tensor.name, True
        raise ExportFailed(f"layer {layer!r} cannot be found in the exported graph")

    def set_weight(self, layer: str, module: nn.Module, weight: FrozenWeight, factor: Tensor | None) -> None:
        """Store a layer's weight as integers (or float16) and note the layer when its activations are 8-bit."""
        number, name, transposed = self._node_of(layer, module)
        node = self.nodes[number]
        if weight.codes is None or weight.scale is None:
            half = numpy_helper.to_array(self.tensors.pop(name)).astype(np.float16)
            self._add_tensor(numpy_helper.from_array(half, f"{name}_f16"))
            self._add("Cast", [f"{name}_f16"], name, to=TensorProto.FLOAT)
            return
        codes, scale = weight.codes.clone(), weight.scale.clone()
        if factor is not None:
            codes *= torch.where(factor < 0, -1.0, 1.0).view(-1, *[1] * (codes.ndim - 1))
            scale *= factor.abs()
        # A scale of zero (BatchNorm switched a channel off) is not allowed; then every code is zero.
        codes[scale < 1e-12] = 0
        values = codes.to(torch.int8).numpy()
        scales = scale.clamp_min(1e-12).numpy().astype(np.float32)
        axis = 0
        if node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute):
            # ONNX Runtime's int8 Gemm reads weights as [inputs, outputs].
            kept = [a for a in node.attribute if a.name != "transB"]
            del node.attribute[:]
            node.attribute.extend(kept)
            transposed = True
        if transposed:
            values, axis = np.ascontiguousarray(values.T), 1
        del self.tensors[name]
        kind = TensorProto.INT4 if weight.weight_bits <= 4 else TensorProto.INT8
        self._add_tensor(
            helper.make_tensor(f"{name}_q", kind, values.shape, codes_to_raw(values.reshape(-1), kind), raw=True)
        )
        shape = [1] * values.ndim
        shape[axis] = -1
        if weight.activation_bits == 32:
            self._add_tensor(numpy_helper.from_array(scales.reshape(shape), f"{name}_s"))
            self._add("Cast", [f"{name}_q"], f"{name}_c", to=TensorProto.FLOAT)
            self._add("Mul", [f"{name}_c", f"{name}_s"], name)
            return
        source = f"{name}_q"
        if kind == TensorProto.INT4:
            self._add("Cast", [source], f"{name}_c", to=TensorProto.INT8)
            source = f"{name}_c"
        self._add_tensor(numpy_helper.from_array(scales, f"{name}_s"))
        self._add_tensor(numpy_helper.from_array(np.zeros(len(scales), np.int8), f"{name}_z"))
        self._add("DequantizeLinear", [source, f"{name}_s", f"{name}_z"], name, axis=axis)
        self.int8[number] = (weight, scales)

    def _add_tensor(self, tensor: onnx.TensorProto) -> None:
        self.tensors[tensor.name] = tensor

    def _add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.added.append(helper.make_node(kind, inputs, [output], name=f"{kind}:{output}", **attributes))

    def _after_activation(self, name: str, readers: Mapping[str, list[int]]) -> str:
        """The tensor behind a Relu or Clip that is the only reader of `name`; ONNX Runtime merges the two."""
        found = readers.get(name, [])
        if len(found) == 1 and name not in self.outputs and self.nodes[found[0]].op_type in _ACTIVATIONS:
            return self.nodes[found[0]].output[0]
        return name

    def insert_activations(self) -> None:
        """Q and DQ on every tensor that an int8 layer reads or writes and wherever they keep a region in int8."""
        if not self.int8:
            return
        readers = self.readers()
        wanted: dict[str, str] = {}  # tensor -> the tensor whose range it shares
        for number in self.int8:
            node = self.nodes[number]
            wanted.setdefault(node.input[0], node.input[0])
            after = self._after_activation(node.output[0], readers)
            if after not in self.outputs:
                wanted.setdefault(after, after)
        for node in self.nodes:
            data = [name for name in node.input[: 1 if node.op_type in _MOVES else None] if name]
            if node.op_type in _MOVES | _COMPUTES and all(name in wanted for name in data):
                after = self._after_activation(node.output[0], readers)
                if after not in self.outputs:
                    share = wanted[data[0]] if node.op_type in _MOVES and after == node.output[0] else after
                    wanted[after] = share
        ranges = self._ranges(sorted(set(wanted.values())))
        scale_of = {}
        for name, source in wanted.items():
            low, high = min(0.0, ranges[source][0]), max(0.0, ranges[source][1])
            scale = max((high - low) / 255.0, 1e-8)
            zero = int(np.clip(round(-low / scale), 0, 255))
            scale_of[name] = np.float32(scale)
            self._add_tensor(numpy_helper.from_array(np.array(scale, np.float32), f"{name}_scale"))
            self._add_tensor(numpy_helper.from_array(np.array(zero, np.uint8), f"{name}_zero"))
            self._add("QuantizeLinear", [name, f"{name}_scale", f"{name}_zero"], f"{name}_q8")
            self._add("DequantizeLinear", [f"{name}_q8", f"{name}_scale", f"{name}_zero"], f"{name}_dq")
        for number, node in enumerate(self.nodes):
            if number in self.int8 and len(node.input) > 2 and node.input[2]:
                self._set_bias(node, scale_of[node.input[0]] * self.int8[number][1])
            for i, name in enumerate(node.input):
                if name in wanted:
                    node.input[i] = f"{name}_dq"

    def _set_bias(self, node: onnx.NodeProto, scales: NDArray[np.float32]) -> None:
        name = node.input[2]
        bias = numpy_helper.to_array(self.tensors[name]).astype(np.float64)
        steps = np.clip(np.rint(bias / scales), -(2**31), 2**31 - 1).astype(np.int32)
        base = f"{node.output[0]}_bias"
        self._add_tensor(numpy_helper.from_array(steps, f"{base}_q"))
        self._add_tensor(numpy_helper.from_array(scales.astype(np.float32), f"{base}_s"))
        self._add("DequantizeLinear", [f"{base}_q", f"{base}_s"], base, axis=0)
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
        for batch in self.calibration():
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
        tensors = [tensor for name, tensor in self.tensors.items() if name in used]
        model = _model(helper.make_graph(nodes, "paretorch", list(graph.input), list(graph.output), tensors))
        try:
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError as error:
            raise ExportFailed(f"the exported graph is not valid ONNX: {error}") from error
        return model


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
    import tempfile
    from pathlib import Path

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
