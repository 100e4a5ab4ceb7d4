"""An ONNX file as a program in eager PyTorch: a function of torch per node, called in order.

Whatever depends on constants alone (unpacking weights of few bits, shapes) is computed once by ONNX Runtime when the
file is loaded, so that only the layers are left to run, in floats. `OPERATORS` lists the operators. A file with another
one is rejected with the operator's name; no operator is replaced by something similar.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from ...errors import ExportFailed
from .runtime import session

Attributes = Mapping[str, Any]
Inputs = Sequence[Tensor]  # None for an optional input that is left out; see `_at`
_Kernels = dict[int, Callable[..., Tensor]]  # by the number of spatial dimensions
_CONV: _Kernels = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: _Kernels = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL: _Kernels = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOL: _Kernels = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_TYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16, 11: torch.float64}


def load(model: bytes, threads: int, device: str = "cpu") -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Load an ONNX file.

    Args:
        model: The bytes of the file.
        threads: CPU threads of each run.
        device: A device of torch, such as `cpu` or `cuda`.

    Returns:
        A function from a batch of inputs to the first output.

    Raises:
        ExportFailed: The bytes are no ONNX file, or an operator is not in `OPERATORS`.
    """
    try:
        graph = onnx.load_from_string(model).graph
    except Exception as error:  # protobuf has a class of its own for what it cannot read
        raise ExportFailed(f"not an ONNX file: {error}") from error
    values, nodes = _constants(graph, model)
    steps = [(_compiled(node), tuple(node.input), tuple(node.output)) for node in nodes]
    place = torch.device(device)
    # Shapes and indices stay on the CPU, as in eager programs.
    held = {name: v.to(place) if v.is_floating_point() else v for name, v in values.items()}
    name, result = graph.input[0].name, graph.output[0].name
    last = _last_uses(steps, result)

    def run(batch: NDArray[Any]) -> NDArray[Any]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)  # takes 0.1 us; restored below for training in the same process
        known: dict[str, Any] = {**held, name: torch.from_numpy(np.ascontiguousarray(batch)).to(place), "": None}
        try:
            with torch.inference_mode():
                for (function, inputs, outputs), gone in zip(steps, last, strict=True):
                    made = function([known[i] for i in inputs])
                    known.update(zip(outputs, made if isinstance(made, tuple | list) else (made,), strict=False))
                    for old in gone:  # otherwise every activation of the network would be in memory at once
                        del known[old]
        except Exception as error:  # torch raises RuntimeError, TypeError, IndexError, ... for shapes that do not fit
            raise ExportFailed(f"the exported network does not run in PyTorch: {error}") from error
        finally:
            torch.set_num_threads(before)
        output: NDArray[Any] = known[result].cpu().numpy()
        return output

    return run


def _last_uses(steps: Sequence[tuple[Any, tuple[str, ...], tuple[str, ...]]], result: str) -> list[list[str]]:
    """For each step the values that no later step reads, which can be freed after it."""
    last: dict[str, int] = {}
    for number, (_, inputs, outputs) in enumerate(steps):
        last |= dict.fromkeys(outputs, number)
        last |= {name: number for name in inputs if name in last}
    gone: list[list[str]] = [[] for _ in steps]
    for name, number in last.items():
        if name != result and name:
            gone[number].append(name)
    return gone


def _constants(graph: onnx.GraphProto, model: bytes) -> tuple[dict[str, Tensor], list[onnx.NodeProto]]:
    """The constants that the other nodes read, and the nodes that depend on the input."""
    known = {t.name for t in graph.initializer}
    folded, left = [], []
    for node in graph.node:
        if all(name in known for name in node.input if name):
            known |= set(node.output)
            folded.append(node)
        else:
            left.append(node)
    used = {name for node in left for name in node.input if name}
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.name in used}
    wanted = sorted({name for node in folded for name in node.output} & used)
    if wanted:
        part = onnx.ModelProto()
        part.CopyFrom(onnx.load_from_string(model))
        outputs = [helper.make_empty_tensor_value_info(name) for name in wanted]
        part.graph.CopyFrom(helper.make_graph(folded, "constants", [], outputs, list(graph.initializer)))
        values |= dict(zip(wanted, session(part).run(wanted, {}), strict=True))
    return {name: torch.from_numpy(np.array(value)) for name, value in values.items()}, left


def _compiled(node: onnx.NodeProto) -> Callable[[Sequence[Any]], Any]:
    """A node as a function of its inputs; raises `ExportFailed` for an operator that is not in `OPERATORS`."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    function = OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if function is None:
        name = f"{node.domain and node.domain + '.'}{node.op_type}"
        raise ExportFailed(f"the torch target has no operator {name}; it has {', '.join(OPERATORS)}")
    return lambda x: function(x, attributes)


def held(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that ONNX's reference evaluator passes, in the form of a file: bytes for texts, no None."""
    return {
        key: value.encode() if isinstance(value, str) else value
        for key, value in attributes.items()
        if value is not None
    }


class NotHere(ValueError):
    """An operator has attributes without an equivalent in torch."""


def _symmetric(
    x: Tensor, a: Attributes, count: int, fill: float, most: Sequence[float] = ()
) -> tuple[Tensor, list[int]]:
    """The input and its symmetric padding, which torch's kernel applies; any other padding is applied here.

    Args:
        x: The input.
        a: The attributes of the node.
        count: The number of spatial dimensions.
        fill: The value to pad with.
        most: The largest padding that torch's kernel accepts, per dimension; empty for any.
    """
    if a.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise NotHere(f"auto_pad {a['auto_pad']!r}")
    pads = list(a.get("pads", [0] * 2 * count))
    if pads[:count] == pads[count:] and all(pad <= limit for pad, limit in zip(pads, most, strict=False)):
        return x, pads[:count]
    flat = [pads[axis + side * count] for axis in reversed(range(count)) for side in (0, 1)]
    return F.pad(x, flat, value=fill), [0] * count


def _conv(i: Inputs, a: Attributes) -> Tensor:
    count = i[1].ndim - 2
    x, padding = _symmetric(i[0], a, count, 0.0)
    ones = [1] * count
    strides, dilations = a.get("strides", ones), a.get("dilations", ones)
    return _CONV[count](x, i[1], _at(i, 2), strides, padding, dilations, a.get("group", 1))


def _conv_transpose(i: Inputs, a: Attributes) -> Tensor:
    count = i[1].ndim - 2
    pads, ones = list(a.get("pads", [0] * 2 * count)), [1] * count
    if pads[:count] != pads[count:] or "output_shape" in a:
        raise NotHere("ConvTranspose with uneven padding")
    strides, dilations = a.get("strides", ones), a.get("dilations", ones)
    extra, groups = a.get("output_padding", [0] * count), a.get("group", 1)
    return _TRANSPOSED[count](i[0], i[1], _at(i, 2), strides, pads[:count], extra, groups, dilations)


def _max_pool(i: Inputs, a: Attributes) -> Tensor:
    count = len(a["kernel_shape"])
    x, padding = _symmetric(i[0], a, count, -math.inf, [size / 2 for size in a["kernel_shape"]])
    if x is not i[0] and a.get("ceil_mode"):
        # Windows that begin in the padding at the end are left out, and torch recognizes only its own padding.
        raise NotHere("MaxPool that rounds up over uneven padding")
    ones = [1] * count
    strides, dilations = a.get("strides", ones), a.get("dilations", ones)
    return _MAX_POOL[count](x, a["kernel_shape"], strides, padding, dilations, bool(a.get("ceil_mode", 0)))


def _average_pool(i: Inputs, a: Attributes) -> Tensor:
    count = len(a["kernel_shape"])
    pads = list(a.get("pads", [0] * 2 * count))
    if pads[:count] != pads[count:]:
        raise NotHere("AveragePool with uneven padding")
    strides, up, padded = a.get("strides", [1] * count), a.get("ceil_mode", 0), a.get("count_include_pad", 0)
    return _AVERAGE_POOL[count](i[0], a["kernel_shape"], strides, pads[:count], bool(up), bool(padded))


def _gemm(i: Inputs, a: Attributes) -> Tensor:
    x = i[0].t() if a.get("transA") else i[0]
    w = i[1].t() if a.get("transB") else i[1]
    alpha: float = a.get("alpha", 1.0)
    beta: float = a.get("beta", 1.0)
    if len(i) < 3 or i[2] is None:
        return alpha * (x @ w)
    return torch.addmm(i[2], x, w, beta=beta, alpha=alpha)


def _dynamic_quantize(i: Inputs, a: Attributes) -> tuple[Tensor, Tensor, Tensor]:
    x = i[0]
    low, high = x.amin().clamp_max(0.0), x.amax().clamp_min(0.0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, 1.0, scale)
    zero = (-low / scale).round().clamp(0, 255)
    return ((x / scale).round() + zero).clamp(0, 255).to(torch.uint8), scale, zero.to(torch.uint8)


def _matmul_integer(i: Inputs, a: Attributes) -> Tensor:
    """Computed in double precision: exact for sums of up to 2^37 products, and faster than torch's integers."""
    x, w = (
        (t.double() if zero is None else t.double() - zero.double())
        for t, zero in ((i[0], _at(i, 2)), (i[1], _at(i, 3)))
    )
    return (x @ w).to(torch.int32)


def _reshape(i: Inputs, a: Attributes) -> Tensor:
    copied = not a.get("allowzero")
    sizes = [i[0].shape[axis] if size == 0 and copied else size for axis, size in enumerate(i[1].tolist())]
    return i[0].reshape(sizes)


def _slice(i: Inputs, a: Attributes) -> Tensor:
    starts, ends = i[1].tolist(), i[2].tolist()
    axes = i[3].tolist() if _at(i, 3) is not None else range(len(starts))
    steps = i[4].tolist() if _at(i, 4) is not None else [1] * len(starts)
    x = i[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        rows = range(x.shape[axis])[start:end:step]
        if step > 0:
            x = x[(slice(None),) * (axis % x.ndim) + (slice(rows.start, rows.stop, step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(rows), device=x.device))
    return x


def _pad(i: Inputs, a: Attributes) -> Tensor:
    x, pads = i[0], i[1].tolist()
    axes = i[3].tolist() if _at(i, 3) is not None else list(range(x.ndim))
    sides = {axis % x.ndim: (pads[n], pads[n + len(axes)]) for n, axis in enumerate(axes)}
    mode = a.get("mode", b"constant").decode()
    flat = [size for axis in reversed(range(x.ndim)) for size in sides.get(axis, (0, 0))]
    if mode == "constant":
        return F.pad(x, flat, value=float(i[2]) if _at(i, 2) is not None else 0.0)
    inner = 2 * (x.ndim - 2)  # torch reflects and repeats over all but the batch and the channels
    if any(flat[inner:]):
        raise NotHere(f"Pad with mode {mode} over the batch or the channels")
    return F.pad(x, flat[:inner], mode={"reflect": "reflect", "edge": "replicate"}[mode])


def _reduced(function: Callable[..., Tensor]) -> Callable[[Inputs, Attributes], Tensor]:
    def reduce(i: Inputs, a: Attributes) -> Tensor:
        axes = i[1].tolist() if _at(i, 1) is not None else list(a.get("axes", []))
        if not axes and a.get("noop_with_empty_axes"):
            return i[0]
        return function(i[0], dim=axes or list(range(i[0].ndim)), keepdim=bool(a.get("keepdims", 1)))

    return reduce


def _split(i: Inputs, a: Attributes) -> tuple[Tensor, ...]:
    axis = a.get("axis", 0)
    if _at(i, 1) is not None:
        return tuple(torch.split(i[0], i[1].tolist(), axis))
    return tuple(torch.split(i[0], -(-i[0].shape[axis] // a["num_outputs"]), axis))


def _gather(i: Inputs, a: Attributes) -> Tensor:
    axis, index = a.get("axis", 0) % i[0].ndim, i[1].to(i[0].device)
    index = torch.where(index < 0, index + i[0].shape[axis], index)
    shape = (*i[0].shape[:axis], *index.shape, *i[0].shape[axis + 1 :])
    return i[0].index_select(axis, index.reshape(-1)).reshape(shape)


def _unsqueeze(i: Inputs, a: Attributes) -> Tensor:
    x = i[0]
    rank = x.ndim + len(i[1])
    for axis in sorted(axis % rank for axis in i[1].tolist()):
        x = x.unsqueeze(axis)
    return x


def _clip(i: Inputs, a: Attributes) -> Tensor:
    low, high = (None if _at(i, n) is None else float(i[n]) for n in (1, 2))
    return torch.clamp(i[0], low, high)


def _div(i: Inputs, a: Attributes) -> Tensor:
    return i[0] / i[1] if i[0].is_floating_point() else torch.div(i[0], i[1], rounding_mode="trunc")


def _layer_norm(i: Inputs, a: Attributes) -> Tensor:
    axis = a.get("axis", -1) % i[0].ndim
    return F.layer_norm(i[0], i[0].shape[axis:], i[1], _at(i, 2), a.get("epsilon", 1e-5))


def _batch_norm(i: Inputs, a: Attributes) -> Tensor:
    return F.batch_norm(i[0], i[3], i[4], i[1], i[2], eps=a.get("epsilon", 1e-5))


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.ndim))


def _at(i: Inputs, n: int) -> Any:
    return i[n] if n < len(i) else None


OPERATORS: dict[str, Callable[[Sequence[Any], Attributes], Any]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": lambda i, a: i[0] @ i[1],
    "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMulInteger": _matmul_integer,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda i, a: i[0].mean(_spatial(i[0]), keepdim=True),
    "GlobalMaxPool": lambda i, a: i[0].amax(_spatial(i[0]), keepdim=True),
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "InstanceNormalization": lambda i, a: F.instance_norm(i[0], weight=i[1], bias=i[2], eps=a.get("epsilon", 1e-5)),
    "Relu": lambda i, a: F.relu(i[0]),
    "Clip": _clip,
    "Sigmoid": lambda i, a: torch.sigmoid(i[0]),
    "Tanh": lambda i, a: torch.tanh(i[0]),
    "Erf": lambda i, a: torch.erf(i[0]),
    "Gelu": lambda i, a: F.gelu(i[0], approximate=a.get("approximate", b"none").decode()),
    "LeakyRelu": lambda i, a: F.leaky_relu(i[0], a.get("alpha", 0.01)),
    "Elu": lambda i, a: F.elu(i[0], a.get("alpha", 1.0)),
    "PRelu": lambda i, a: torch.where(i[0] < 0, i[1] * i[0], i[0]),
    "Softplus": lambda i, a: F.softplus(i[0]),
    "HardSigmoid": lambda i, a: torch.clamp(a.get("alpha", 0.2) * i[0] + a.get("beta", 0.5), 0, 1),
    "HardSwish": lambda i, a: F.hardswish(i[0]),
    "Softmax": lambda i, a: torch.softmax(i[0], a.get("axis", -1)),
    "LogSoftmax": lambda i, a: torch.log_softmax(i[0], a.get("axis", -1)),
    "Mean": lambda i, a: sum(i[1:], i[0]) / len(i),
    "Add": lambda i, a: i[0] + i[1],
    "Sub": lambda i, a: i[0] - i[1],
    "Mul": lambda i, a: i[0] * i[1],
    "Div": _div,
    "Pow": lambda i, a: torch.pow(i[0], i[1]),
    "Sqrt": lambda i, a: torch.sqrt(i[0]),
    "Exp": lambda i, a: torch.exp(i[0]),
    "Log": lambda i, a: torch.log(i[0]),
    "Neg": lambda i, a: -i[0],
    "Abs": lambda i, a: torch.abs(i[0]),
    "Reciprocal": lambda i, a: torch.reciprocal(i[0]),
    "Floor": lambda i, a: torch.floor(i[0]),
    "Min": lambda i, a: torch.minimum(i[0], i[1]),
    "Max": lambda i, a: torch.maximum(i[0], i[1]),
    "Equal": lambda i, a: i[0] == i[1],
    "Greater": lambda i, a: i[0] > i[1],
    "Less": lambda i, a: i[0] < i[1],
    "Where": lambda i, a: torch.where(i[0], i[1], i[2]),
    "ReduceMean": _reduced(torch.mean),
    "ReduceSum": _reduced(torch.sum),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMin": _reduced(torch.amin),
    "ReduceL2": _reduced(torch.linalg.vector_norm),
    "Identity": lambda i, a: i[0],
    "Dropout": lambda i, a: i[0],
    "Cast": lambda i, a: i[0].to(_TYPES[a["to"]]),
    "Shape": lambda i, a: torch.tensor(i[0].shape[a.get("start", 0) : a.get("end")]),
    "Flatten": lambda i, a: i[0].reshape(math.prod(i[0].shape[: a.get("axis", 1)]), -1),
    "Reshape": _reshape,
    "Transpose": lambda i, a: i[0].permute(a.get("perm") or tuple(reversed(range(i[0].ndim)))),
    "Squeeze": lambda i, a: i[0].squeeze() if _at(i, 1) is None else i[0].squeeze(tuple(i[1].tolist())),
    "Unsqueeze": _unsqueeze,
    "Concat": lambda i, a: torch.cat([x.to(i[0].device) for x in i], a["axis"]),
    "Slice": _slice,
    "Split": _split,
    "Pad": _pad,
    "Gather": _gather,
    "Expand": lambda i, a: i[0] * torch.ones(i[1].tolist(), dtype=i[0].dtype, device=i[0].device),
    "Tile": lambda i, a: i[0].repeat(i[1].tolist()),
    "ConstantOfShape": lambda i, a: torch.full(
        i[0].tolist(), numpy_helper.to_array(a["value"]).item() if "value" in a else 0.0
    ),
}
