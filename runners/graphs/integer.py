"""Quantized layers as a runtime carries them out: integers between one Quantize and the next.

A graph says that a convolution computes on floats between a Dequantize and a Quantize. A runtime adds up whole
numbers there, and comes back to 8 bits with one product. Both mean the same, but not to the last bit: a sum that lies
at the border of two steps falls to the other side, one time in a hundred thousand, and every fall moves some of the
next layer's. After fifty layers that is 0.3% of the largest output, which is many answers of a network that is not
sure of them. So `fuse` puts one node in the place of `Dequantize, operator, activation, Quantize`, with the points of
requantisation and the rounding that ONNX Runtime's kernels have:

    layers       q = round(float(sum(x - x_zero) * (w - w_zero) + bias) * (x_scale * w_scale / y_scale)) + y_zero
    Add          q = round(a * (a_scale / y_scale) + (b * (b_scale / y_scale) + rest)), two fused products
    averages     q = round(float(sum(x - x_zero)) * (x_scale / (y_scale * count))) + y_zero

in float32, half to even; the rest of a sum is that of the zero points. Only what stands between quantized numbers on
all sides is fused; all else is computed as it is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference.op_run import OpRun
from torch import Tensor

from ..operators.layers import ONNX
from ..targets.torch_graph import OPERATORS, held

DOMAIN = "paretorch"
_EXACT = 1 << 24  # whole numbers below it are exact in float32, and so are their sums in any order
# Operators that are carried out on whole numbers, and how many of their inputs are quantized numbers.
_NUMBERS = dict.fromkeys(ONNX, 2) | {"Add": 2, "GlobalAveragePool": 1}
_CLAMPS = ("Relu", "Clip")


@dataclass(frozen=True)
class _Graph:
    """What a graph says of its tensors: constants (weights of 4 and 2 bits widened), and nodes by tensor."""

    constants: Mapping[str, NDArray[Any]]
    makers: Mapping[str, onnx.NodeProto]
    users: Mapping[str, Sequence[onnx.NodeProto]]
    outputs: frozenset[str]

    def only_user(self, name: str) -> onnx.NodeProto | None:
        """The node that reads a tensor, if it is one and the tensor is no output of the graph."""
        users = self.users.get(name, [])
        return users[0] if len(users) == 1 and name not in self.outputs else None

    def dequantized(self, name: str) -> list[str] | None:
        """What a Dequantize is given that makes this number, or None."""
        node = self.makers.get(name)
        return list(node.input) if node is not None and node.op_type == "DequantizeLinear" else None


def fuse(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with `DOMAIN` operators in the place of quantized ones; `OPS` carries them out."""
    graph = _read(model.graph)
    replaced: dict[int, onnx.NodeProto] = {}  # by the place of the Quantize that a region ends with
    gone: set[int] = set()
    place = {id(node): number for number, node in enumerate(model.graph.node)}
    for number, node in enumerate(model.graph.node):
        clamps, end = _region(node, graph)
        inputs = None if end is None else _fused_inputs(node, clamps, end, graph)
        if end is None or inputs is None:
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        replaced[place[id(end)]] = helper.make_node(
            f"Integer{node.op_type}", inputs, end.output, domain=DOMAIN, **attributes
        )
        gone |= {number, *(place[id(clamp)] for clamp in clamps)}
    fused = onnx.ModelProto()
    fused.CopyFrom(model)
    del fused.graph.node[:]
    fused.graph.node.extend(replaced.get(n, node) for n, node in enumerate(model.graph.node) if n not in gone)
    fused.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return fused


def _read(graph: onnx.GraphProto) -> _Graph:
    constants = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    for node in graph.node:  # weights of 4 and 2 bits, which ONNX Runtime widens when it loads them
        if node.op_type == "Cast" and node.input[0] in constants and node.attribute[0].i == onnx.TensorProto.INT8:
            constants[node.output[0]] = constants[node.input[0]].astype(np.int8)
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    makers = {name: node for node in graph.node for name in node.output}
    return _Graph(constants, makers, users, frozenset(entry.name for entry in graph.output))


def _region(node: onnx.NodeProto, graph: _Graph) -> tuple[list[onnx.NodeProto], onnx.NodeProto | None]:
    """The activations behind an operator, and the Quantize behind these, or None where there is none."""
    clamps: list[onnx.NodeProto] = []
    end = graph.only_user(node.output[0]) if node.op_type in _NUMBERS else None
    while end is not None and end.op_type in _CLAMPS:
        clamps.append(end)
        end = graph.only_user(end.output[0])
    return clamps, end if end is not None and end.op_type == "QuantizeLinear" and len(end.input) > 2 else None


def _fused_inputs(
    node: onnx.NodeProto, clamps: Sequence[onnx.NodeProto], end: onnx.NodeProto, graph: _Graph
) -> list[str] | None:
    """What the fused operator reads: numbers with scales and zero points, scale and zero point of the result, a bias.

    None where the region cannot be computed on whole numbers.
    """
    constants = graph.constants
    given = (graph.dequantized(name) for name in list(node.input)[: _NUMBERS[node.op_type]])
    sources = [source for source in given if source is not None and len(source) > 2]
    if len(sources) < _NUMBERS[node.op_type] or any(name not in constants for name in end.input[1:3]):
        return None
    points = [source[2] for source in sources] + [end.input[2]]
    if any(constants[name].dtype not in (np.uint8, np.int8) for name in points if name in constants):
        return None  # of 4 and 16 bits, which runtimes here compute in floats
    inputs = [name for source in sources for name in source[:3]] + list(end.input[1:3])
    if node.op_type in ONNX:
        bias = _bias(node, graph)
        if bias is None or not _fits(node, sources[1], constants):
            return None
        inputs += bias
    elif any(constants[name].size != 1 for name in inputs if name in constants):
        return None
    return inputs if all(_absorbed(clamp, end, constants) for clamp in clamps) else None


def _bias(node: onnx.NodeProto, graph: _Graph) -> list[str] | None:
    """The name of a layer's bias in whole numbers, if it has one; None where its bias is another."""
    place = ONNX[node.op_type].bias
    if place is None or len(node.input) <= place or not node.input[place]:
        return []
    source = graph.dequantized(node.input[place])
    return [source[0]] if source and graph.constants.get(source[0], np.zeros(0)).dtype == np.int32 else None


def _fits(node: onnx.NodeProto, weight: Sequence[str], constants: Mapping[str, NDArray[Any]]) -> bool:
    """Whether a layer has a weight of 8-bit whole numbers with one zero point for all, and is nothing but a product
    and a sum.
    """
    values, scale, zero = (constants.get(name) for name in weight[:3])
    if values is None or values.dtype != np.int8 or scale is None or scale.ndim > 1 or zero is None or np.ptp(zero):
        return False
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0 and not given.get("transA")


def _absorbed(clamp: onnx.NodeProto, end: onnx.NodeProto, constants: Mapping[str, NDArray[Any]]) -> bool:
    """Whether a Relu or a Clip cuts off nothing that the Quantize after it would keep; else a runtime computes it on
    floats.
    """
    scale, zero = (constants[name] for name in end.input[1:3])
    limits = np.iinfo(zero.dtype)
    lowest, highest = (np.float32(scale) * np.float32(edge - int(zero)) for edge in (limits.min, limits.max))
    low, high = (0.0, None) if clamp.op_type == "Relu" else (_cut(clamp, n, constants) for n in (1, 2))
    least = np.finfo(np.float32).eps
    return bool((low is None or low - lowest <= least) and (high is None or highest - high <= least))


def _cut(clamp: onnx.NodeProto, number: int, constants: Mapping[str, NDArray[Any]]) -> float | None:
    name = clamp.input[number] if number < len(clamp.input) else ""
    return float(constants[name]) if name else None


def _back(values: Tensor, zero: NDArray[Any]) -> NDArray[Any]:
    """Round half to even, saturate: `[...]` of the zero point's type."""
    limits = np.iinfo(zero.dtype)
    whole = values.round_().add_(int(zero)).clamp_(limits.min, limits.max)
    numbers: NDArray[Any] = whole.numpy().astype(zero.dtype)
    return numbers


def _scale(*factors: NDArray[Any]) -> Tensor:
    """`x_scale * w_scale / y_scale` in float32, as the kernels compute it."""
    x, w, y = (np.float32(factor) for factor in factors)
    return torch.from_numpy(np.atleast_1d((x * w / y).astype(np.float32)))


class _Layer(OpRun):  # type: ignore[misc]  # ONNX has no types
    """A layer on whole numbers."""

    op_domain = DOMAIN

    # ONNX reads the names of the arguments.
    def _run(self, x, xs, xz, w, ws, wz, ys, yz, bias=None, **attributes):  # type: ignore[no-untyped-def]  # as ONNX
        name = type(self).__name__.removeprefix("Integer")
        given = held(attributes)
        axis = ONNX[name].output_axis(given, w.ndim)
        others = tuple(n for n in range(w.ndim) if n != axis)
        w = w.astype(np.int64) - int(wz.flat[0])
        reach = max(int(xz) - np.iinfo(x.dtype).min, np.iinfo(x.dtype).max - int(xz))
        largest = reach * np.abs(w).sum(others).max() + (0 if bias is None else np.abs(bias.astype(np.int64)).max())
        kind = np.float32 if largest < _EXACT else np.float64
        total = OPERATORS[name]([torch.from_numpy(x.astype(kind) - kind(xz)), torch.from_numpy(w.astype(kind))], given)
        shape = [1] * total.ndim
        shape[ONNX[name].channel_axis] = -1
        if bias is not None:
            total += torch.from_numpy(bias.astype(kind)).reshape(shape)
        return (_back(total.float() * _scale(xs, ws, ys).reshape(shape), yz),)


class IntegerConv(_Layer):
    """Convolution."""


class IntegerGemm(_Layer):
    """Linear layer."""


class IntegerMatMul(_Layer):
    """Linear layer over tokens."""


class IntegerAdd(OpRun):  # type: ignore[misc]  # ONNX has no types
    """Sum of two quantized tensors, with fused multiply-adds: in float64, rounded to float32 where these round."""

    op_domain = DOMAIN

    def _run(self, a, sa, za, b, sb, zb, ys, yz):  # type: ignore[no-untyped-def]  # ONNX reads its names
        first, second = np.float32(sa) / np.float32(ys), np.float32(sb) / np.float32(ys)
        zeros = _fused(np.float64(za), first, second * np.float32(float(zb)))
        whole = _fused(a, first, _fused(b, second, np.float32(float(yz)) - zeros))
        return (_back(torch.from_numpy(whole), np.zeros_like(yz)),)


class IntegerGlobalAveragePool(OpRun):  # type: ignore[misc]  # ONNX has no types
    """Mean over all positions."""

    op_domain = DOMAIN

    def _run(self, x, xs, xz, ys, yz):  # type: ignore[no-untyped-def]  # ONNX reads its names
        axes = tuple(range(2, x.ndim))
        total = torch.from_numpy((x.astype(np.int64) - int(xz)).sum(axes, keepdims=True))
        count = x[0, 0].size
        return (_back(total.float() * float(np.float32(xs) / (np.float32(ys) * np.float32(count))), yz),)


def _fused(x: Any, factor: np.float32, rest: Any) -> Any:
    """`x * factor + rest`, rounded once, to float32."""
    return (np.asarray(x, np.float64) * np.float64(factor) + rest).astype(np.float32)


OPS = [IntegerConv, IntegerGemm, IntegerMatMul, IntegerAdd, IntegerGlobalAveragePool]
