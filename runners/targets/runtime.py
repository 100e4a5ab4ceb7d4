"""ONNX Runtime's sessions, with the same options wherever a file is measured or shipped. Imports no torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from ...errors import ExportFailed

if TYPE_CHECKING:
    import onnx

# This optimizer silently turns a float layer between two int8 layers into an int8 one.
DISABLED_OPTIMIZERS = ["WeightBiasQuantization"]


def session_options(threads: int) -> ort.SessionOptions:
    """The options of every session: fixed threads, no spinning, exact 8-bit products, and only errors in the log."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without VNNI, x86 sums products of uint8 and int8 in 16 bits, which saturate; that can ruin a whole network.
    # With this option ONNX Runtime turns the weights to uint8 there, whose kernels are exact. Elsewhere it has no
    # effect.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def session(model: onnx.ModelProto | bytes | Path, threads: int = 1) -> ort.InferenceSession:
    """A session on the CPU.

    Args:
        model: The model, its bytes, or the path of its file.
        threads: Threads within an operator.

    Raises:
        ExportFailed: ONNX Runtime refuses the model.
    """
    source = str(model) if isinstance(model, Path) else model if isinstance(model, bytes) else model.SerializeToString()
    try:
        try:
            return _created(source, threads)
        except Exception as error:  # ONNX Runtime raises a class per status, without a common base but this
            if "replace the existing tensor" not in str(error):
                raise
            return _created(_with_tensors_of_their_own(source), threads)
    except Exception as error:
        raise ExportFailed(f"ONNX Runtime cannot load the exported network: {error}") from error


def _created(source: str | bytes, threads: int) -> ort.InferenceSession:
    return ort.InferenceSession(
        source, session_options(threads), providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED_OPTIMIZERS
    )


def _with_tensors_of_their_own(source: str | bytes) -> bytes:
    """The same model, in which each node has int8 weights of its own.

    ONNX Runtime 1.32 turns the weights of each node to uint8 under a name made from the tensor's, and fails where two
    nodes share the tensor.
    """
    import onnx

    model = onnx.load(source) if isinstance(source, str) else onnx.load_from_string(source)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    seen: set[str] = set()
    for number, node in enumerate(model.graph.node):
        for place, name in enumerate(node.input):
            if name in seen and name in stored and stored[name].data_type == onnx.TensorProto.INT8:
                own = model.graph.initializer.add()
                own.CopyFrom(stored[name])
                own.name = node.input[place] = f"{name}/{number}"
            seen.add(name)
    data: bytes = model.SerializeToString()
    return data


@cache
def sums_are_exact() -> bool:
    """Whether ONNX Runtime with its default options adds up products of uint8 and int8 exactly on this machine.

    Without VNNI, x86 adds them in pairs in 16 bits, which saturate: 255 * 127 + 255 * 127 becomes 32767. Weights of at
    most 7 bits (63) never reach that, and the sessions of `session_options` are exact everywhere. Tested by one run.
    """
    from onnx import TensorProto, helper, numpy_helper

    inputs, outputs = 64, 16
    weights = numpy_helper.from_array(np.full((inputs, outputs), 127, np.int8), "w")
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, inputs])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [1, outputs])
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "sums", [x], [y], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    plain = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (sums,) = plain.run(None, {"x": np.full((1, inputs), 255, np.uint8)})
    return bool((sums == inputs * 255 * 127).all())
