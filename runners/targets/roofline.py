"""Accelerators without a device: the milliseconds of a file by the roofline model, from a profile of the hardware.

A layer takes as long as the slowest of three processes that overlap (Williams et al. 2009, "Roofline"): its
multiply-adds on the unit for its bit widths, the transfer of its weights, and the transfer of its inputs and outputs.
Where weights and activations share one memory, their bytes add up. Only convolutions and matrix products count; other
operators are assumed to be fused into them. Zero weights cost as much as others. Weights and activations have the bit
widths of the file, rounded up to those of the profile. The bytes of scales and biases, 1% of a layer's, are left out.

Everything is read from the ONNX file, so the metric is exact. It is a lower bound of the latency on the hardware, not
what a compiler will reach. Accuracy is that of the file in ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ...errors import ExportFailed, TargetError
from ...spaces.steps import Step
from ...spaces.techniques.quantize import Quantize
from ..files.packing import signs, width
from .onnxruntime import load
from .runtime import session
from .target import Target

_BITS = {TensorProto.FLOAT: 32, TensorProto.DOUBLE: 64, TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16}
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulNBits")
_FUSED = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSwish")


@dataclass(frozen=True)
class Profile:
    """What an accelerator can do; `configs/accelerators/edge_npu.yaml` explains each number with an example.

    Attributes:
        name: The name of the target.
        operations: Operations per second, by the bits of weights and activations (`8x8`). A multiply-add is two
            operations. `32x32` is required.
        weight_bytes: Bytes per second from the memory of the weights.
        activation_bytes: Bytes per second from and to the memory of the activations.
        shared: Whether weights and activations share one memory.
        layer_seconds: Seconds to start a layer.
    """

    name: str
    operations: Mapping[str, float]
    weight_bytes: float
    activation_bytes: float
    shared: bool = False
    layer_seconds: float = 0.0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Profile:
        """The profile of the plain data that `asdict` gives.

        Raises:
            TargetError: The data is something else.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise TargetError(f"not the profile of an accelerator: {error}") from error

    @property
    def pairs(self) -> dict[tuple[int, int], float]:
        """Operations per second by bits of weights and activations, the narrowest first."""
        split = ((pair.split("x"), rate) for pair, rate in self.operations.items())
        return dict(sorted(((int(weights), int(activations)), rate) for (weights, activations), rate in split))


@dataclass(frozen=True)
class Cost:
    """The work and the traffic of one layer of a file.

    Args:
        name: The name of the layer.
        macs: Multiply-adds.
        weights: How many weights there are; 0 for a product of two activations.
        weight_bits: Bits of a weight.
        activation_bits: Bits of the activations that the layer computes on.
        inputs: How many inputs it reads.
        input_bits: Bits of an input in memory.
        outputs: How many outputs it writes.
        output_bits: Bits of an output in memory.
    """

    name: str
    macs: int
    weights: int
    weight_bits: int
    activation_bits: int
    inputs: int
    input_bits: int
    outputs: int
    output_bits: int


def analytic(profile: Profile) -> Target:
    """The target that a profile describes."""
    pairs = ", ".join(profile.operations)

    def supports(step: Step) -> str | None:
        if isinstance(step, Quantize) and (step.weight_bits, step.activation_bits) not in profile.pairs:
            return (
                f"{profile.name} has no unit for {step.weight_bits}-bit weights with {step.activation_bits}-bit "
                f"activations; it has {pairs}"
            )
        if isinstance(step, Quantize) and step.activations == "dynamic":
            return f"{profile.name} finds no ranges at run time; choose static activations"
        return None

    plain = json.loads(json.dumps(asdict(profile)))
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
    return Target(
        profile.name,
        load,
        supports,
        lambda model, batch: 1e3 * math.fsum(seconds(cost, profile) for cost in costs(model, batch)),
        environment={"profile": f"{profile.name}, sha256 {digest}"},
        profile=plain,
    )


def seconds(cost: Cost, profile: Profile) -> float:
    """The seconds of a layer.

    Raises:
        ExportFailed: The profile has no unit that is wide enough.

    >>> profile = Profile("npu", {"8x8": 2e12, "32x32": 1e11}, 1e10, 1e10)
    >>> seconds(Cost("fc", 10**6, 10**6, 8, 8, 1000, 8, 1000, 8), profile)  # a million bytes of weights
    0.0001
    """
    fits = [(w, rate) for (w, a), rate in profile.pairs.items() if w >= cost.weight_bits and a >= cost.activation_bits]
    if not fits:
        raise ExportFailed(
            f"layer {cost.name} has {cost.weight_bits}-bit weights and {cost.activation_bits}-bit activations; "
            f"{profile.name} has {', '.join(profile.operations)}"
        )
    bits, rate = fits[0]
    loaded = cost.weights * bits / 8 / profile.weight_bytes
    moved = (cost.inputs * cost.input_bits + cost.outputs * cost.output_bits) / 8 / profile.activation_bytes
    traffic = loaded + moved if profile.shared else max(loaded, moved)
    return max(2 * cost.macs / rate, traffic) + profile.layer_seconds


def costs(model: bytes, batch: int = 1) -> list[Cost]:
    """The work and the traffic of each layer of an ONNX file for a batch of inputs.

    The shapes are taken from a run, because ONNX's shape inference does not cover every operator.

    Args:
        model: The bytes of the file.
        batch: Inputs per run.

    Raises:
        ExportFailed: The bytes are no ONNX file, or the network does not run.
    """
    graph = _CostGraph(model)
    shapes = graph.shapes(batch)
    return [graph.cost(node, shapes) for node in graph.layers]


class _CostGraph:
    """An ONNX graph, indexed by the names of its tensors."""

    def __init__(self, model: bytes) -> None:
        try:
            self.model = onnx.load_from_string(model)
        except Exception as error:  # protobuf has a class of its own for what it cannot read
            raise ExportFailed(f"not an ONNX file: {error}") from error
        self.tensors = {t.name: t for t in self.model.graph.initializer}
        self.maker = {name: node for node in self.model.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        self.constant = set(self.tensors)
        for node in self.model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
            if all(name in self.constant for name in node.input if name):
                self.constant |= set(node.output)
        self.layers = [n for n in self.model.graph.node if n.op_type in _LAYERS and n.output[0] not in self.constant]

    def shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the layers' inputs, weights and outputs, from a run on zeros that returns only shapes."""
        wanted = sorted({name for node in self.layers for name in (*node.input[:2], node.output[0])})
        probe = onnx.ModelProto()
        probe.CopyFrom(self.model)
        for number, name in enumerate(wanted):
            probe.graph.node.append(helper.make_node("Shape", [name], [f"shape of {number}"]))
            probe.graph.output.append(helper.make_tensor_value_info(f"shape of {number}", TensorProto.INT64, None))
        runtime = session(probe)
        entry = runtime.get_inputs()[0]
        sizes = [batch if axis == 0 else size for axis, size in enumerate(entry.shape)]
        if not all(isinstance(size, int) for size in sizes):
            raise ExportFailed(f"input {entry.name!r} is {entry.shape}: the shapes beyond the batch are open")
        try:
            outputs = [f"shape of {number}" for number in range(len(wanted))]
            shapes = runtime.run(outputs, {entry.name: np.zeros(sizes, np.float32)}) if wanted else []
        except Exception as error:  # ONNX Runtime raises a class per status, without a common base but this
            raise ExportFailed(f"the exported network does not run in ONNX Runtime: {error}") from error
        return {name: tuple(int(size) for size in shape) for name, shape in zip(wanted, shapes, strict=True)}

    def cost(self, node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> Cost:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        source, weight = node.input[:2]
        x, w, y = (shapes[name] for name in (source, weight, node.output[0]))
        inputs, weights, outputs = math.prod(x), math.prod(w), math.prod(y)
        stored = weight in self.constant
        if node.op_type == "Conv":
            macs = outputs * math.prod(w[1:])
        elif node.op_type == "ConvTranspose":
            macs = inputs * math.prod(w[1:])
        elif node.op_type == "MatMulNBits":
            weights = attributes["K"] * attributes["N"]
            macs = outputs * attributes["K"]
        else:
            macs = outputs * (x[0] if attributes.get("transA") else x[-1])
        read = self._made_bits(source)
        if not stored:  # a product of two activations, which are both read
            other = self._made_bits(weight)
            bits = (max(read, other),) * 2
            inputs, weights, read = inputs + weights, 0, max(read, other)
        elif node.op_type == "MatMulNBits":
            bits = attributes["bits"], 32
        else:
            integer = weight in self.maker and self.maker[weight].op_type == "DequantizeLinear"
            bits = self._stored_bits(weight, weights), read if integer else 32
        name = weight.removesuffix("_dq").removesuffix(".weight") if stored else node.output[0]
        return Cost(name, macs, weights, *bits, inputs, read, outputs, self._written_bits(node.output[0]))

    def _type_bits(self, node: onnx.NodeProto) -> int:
        """The bits of the integers that a Q or DQ node writes or reads: those of its zero point, 8 without one."""
        zero = self.tensors.get(node.input[2]) if len(node.input) > 2 else None
        name = "INT8" if zero is None else TensorProto.DataType.Name(zero.data_type)
        return int(name.lstrip("UINT"))

    def _made_bits(self, name: str) -> int:
        """The bits of an activation as a layer reads it."""
        node = self.maker.get(name)
        while node is not None and node.op_type in ("Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze"):
            node = self.maker.get(node.input[0])
        return self._type_bits(node) if node is not None and node.op_type == "DequantizeLinear" else 32

    def _written_bits(self, name: str) -> int:
        """The bits of an output as a layer writes it: those of the integers where only Q nodes read it."""
        readers = self.readers.get(name, [])
        if len(readers) == 1 and readers[0].op_type in _FUSED:
            return self._written_bits(readers[0].output[0])
        if readers and all(node.op_type == "QuantizeLinear" for node in readers):
            return self._type_bits(readers[0])
        return 32

    def _stored_bits(self, weight: str, count: int) -> int:
        """The bits of a weight: those of its code where the file stores one per weight, else its share of the bytes."""
        sources: dict[str, onnx.TensorProto] = {}
        waiting = [weight]
        while waiting:
            name = waiting.pop()
            if name in self.tensors:
                sources[name] = self.tensors[name]
            else:
                waiting += [source for source in self.maker[name].input if source]
        whole = [t for t in sources.values() if math.prod(t.dims) == count]
        if len(whole) == 1 and whole[0].data_type in _BITS:
            return _BITS[whole[0].data_type]
        if len(whole) == 1:
            codes = numpy_helper.to_array(whole[0])
            if whole[0].data_type in (TensorProto.INT8, TensorProto.INT4, TensorProto.INT2):
                values = codes.astype(np.int8).reshape(-1)
                return 1 if signs(values) else width(values)
            return max(1, int(codes.astype(np.int64).max()).bit_length())
        stored = sum(len(t.raw_data) for t in sources.values() if t.data_type not in _BITS)
        return math.ceil(8 * stored / count)
