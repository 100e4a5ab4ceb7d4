"""A network as a float ONNX graph: exported, and tidied up so that equal networks give equal graphs in few bytes.

The graph comes from torch's TorchScript exporter: 0.1-0.5 s per network, where the newer one (`dynamo=True`) takes
3-16 s, which a search would pay in every trial. The newer one steps in where the first fails.
"""

from __future__ import annotations

import ctypes
import io
import itertools
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from ...errors import ExportFailed
from .nodes import OPSET, model_of


def export_float(model: nn.Module, example: Tensor) -> onnx.ModelProto:
    """The network as a float ONNX graph with an open batch size.

    Raises:
        ExportFailed: Neither of torch's exporters can convert it.
    """
    model = model.eval()
    buffer = io.BytesIO()
    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["output"]}
    with warnings.catch_warnings(), _plain_attention(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            # Initializers are inputs too (until `_tidied`), or layers of equal weights would come out as sharing one.
            with _quiet():
                torch.onnx.export(
                    model,
                    (example,),
                    buffer,  # type: ignore[arg-type]  # torch's stubs know no buffer
                    dynamo=False,
                    opset_version=20,
                    do_constant_folding=True,
                    dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
                    keep_initializers_as_inputs=True,
                    **names,
                )
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
    return _tidied(graph)


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
    """Suppress the pages that the older exporter prints, past Python, for a graph that it cannot convert."""
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


def _tidied(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph without Identity and Constant nodes, unused tensors, names of nodes and metadata."""
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
    return model_of(clean)


def number_tensors(model: onnx.ModelProto) -> dict[str, str]:
    """Replace the exporter's paths (`/layer1/layer1.0/conv1/Conv_output_0`) by numbers, in place.

    With all that is named after them they were a twentieth of a small int8 file. Parameters keep their names.

    Returns:
        By number the path that it stands for.
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
