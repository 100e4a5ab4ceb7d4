"""An ONNX graph under edit: its nodes and tensors, and the model that they make in the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

from ...errors import ExportFailed

OPSET = 21  # the first with INT4
_OPSET_INT2 = 25  # the first with INT2: only of files that hold one, as an older ONNX Runtime cannot load it
MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators


def model_of(graph: onnx.GraphProto) -> onnx.ModelProto:
    """The model of a graph, with the opsets that its operators and types need."""
    opset = _OPSET_INT2 if any(t.data_type == TensorProto.INT2 for t in graph.initializer) else OPSET
    opsets = [helper.make_opsetid("", opset)]
    if any(node.domain == MICROSOFT for node in graph.node):
        opsets.append(helper.make_opsetid(MICROSOFT, 1))
    made = helper.make_model(graph, opset_imports=opsets, producer_name="paretorch")
    made.ir_version = 10
    return made


class EditedGraph:
    """The nodes and tensors of a model's graph, free to be changed; the model itself stays as it is.

    nodes: those of the network, changed in place. added: those beside them, in any order. tensors: by name. outputs:
    the names of the graph's outputs.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = [_copied(node) for node in model.graph.node]
        self.added: list[onnx.NodeProto] = []
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {output.name for output in model.graph.output}

    def readers(self) -> dict[str, list[int]]:
        """By tensor the numbers of the nodes that read it."""
        readers: dict[str, list[int]] = defaultdict(list)
        for number, node in enumerate(self.nodes):
            for name in node.input:
                readers[name].append(number)
        return readers

    def makers(self) -> dict[str, int]:
        """By tensor the number of the node that makes it."""
        return {name: number for number, node in enumerate(self.nodes) for name in node.output}

    def add_tensor(self, tensor: onnx.TensorProto) -> None:
        self.tensors[tensor.name] = tensor

    def add_node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        self.added.append(helper.make_node(kind, inputs, [output], **attributes))

    def finish(self) -> onnx.ModelProto:
        """The edited graph in topological order, checked; raises `ExportFailed`."""
        graph = self.model.graph
        nodes = _sorted([*self.added, *self.nodes], {*self.tensors, *(i.name for i in graph.input)})
        used = {name for node in nodes for name in node.input}
        nodes = [node for node in nodes if used.union(self.outputs).intersection(node.output)]
        used = {name for node in nodes for name in node.input}
        tensors = [tensor for name, tensor in self.tensors.items() if name in used]
        model = model_of(helper.make_graph(nodes, "paretorch", list(graph.input), list(graph.output), tensors))
        try:
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError as error:
            raise ExportFailed(f"the exported graph is not valid ONNX: {error}") from error
        return model


def _copied(node: onnx.NodeProto) -> onnx.NodeProto:
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
