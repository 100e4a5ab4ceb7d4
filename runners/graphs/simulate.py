"""A simulation of exported graphs that does not use ONNX Runtime: the reference of the parity check.

Quantize and Dequantize are computed as ONNX specifies them (divide, round half to even, saturate, and back to floats).
A layer between quantized tensors adds up integers and is requantized where the runtime requantizes (`integer`). All
else is computed on floats, node by node, by ONNX's reference implementation, except for a few operators that take
minutes there and are computed by the torch target. ONNX Runtime optimizes the same graph, and `agreement` says how
often both give the same prediction.

Where every layer is quantized they agree to the last bit. Where floats are added they do not: in another order, a
number on the border between two steps may round the other way. So predictions are compared, and the size of the
differences is reported as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops._op_list import MaxPool as ReferenceMaxPool
from torch import Tensor

from ..files import packing
from ..settings import PARITY_INPUTS
from ..targets.runtime import session
from ..targets.torch_graph import OPERATORS, NotHere, held
from .integer import OPS, fuse

_BATCH = 16  # inputs per run, because the reference keeps every tensor of the network until the end


class _ByTorch(OpRun):  # type: ignore[misc]  # ONNX has no types
    """An operator as the torch target computes it."""

    op_domain = ""

    def _run(self, *inputs, **attributes):  # type: ignore[no-untyped-def]  # ONNX reads its names
        return _by_torch(type(self).__name__, inputs, attributes)


class Conv(_ByTorch):
    """Convolution."""


class Gemm(_ByTorch):
    """Matrix product with a bias."""


class MatMul(_ByTorch):
    """Matrix product."""


class MatMulInteger(_ByTorch):
    """Matrix product of integers: ONNX's own takes minutes."""


class MaxPool(ReferenceMaxPool):  # type: ignore[misc]  # ONNX has no types
    """Max pooling: by torch where it can, which the reference of ONNX 1.23 cannot where sizes are rounded up."""

    op_domain = ""

    def _run(self, x, **attributes):  # type: ignore[no-untyped-def]  # ONNX reads its names
        if x.dtype == np.float32 and len(self.output) == 1:
            with contextlib.suppress(NotHere):
                return _by_torch("MaxPool", [x], attributes)
        return super()._run(x, **attributes)


class MatMulNBits(OpRun):  # type: ignore[misc]  # ONNX has no types
    """ONNX Runtime's product with packed 4-bit weights, which ONNX does not have, by torch on unpacked weights."""

    op_domain = "com.microsoft"

    def _run(self, a, b, scales, *rest, **attributes):  # type: ignore[no-untyped-def]  # ONNX reads its names
        outputs, block = attributes["N"], attributes["block_size"]
        if attributes["bits"] != 4 or any(given is not None for given in rest[:2]):
            raise NotImplementedError("MatMulNBits with other bits than 4, with zero points or groups")
        codes = packing.nibbles_to_codes(b.tobytes()).reshape(outputs, -1, block)
        weight = _tensor((codes * scales.reshape(outputs, -1, 1)).reshape(outputs, -1))
        product = torch.matmul(_tensor(a), weight.T)
        return ((product + _tensor(rest[2]) if len(rest) > 2 else product).numpy(),)


def _by_torch(name: str, inputs: Sequence[NDArray[Any] | None], attributes: Mapping[str, Any]) -> tuple[NDArray[Any]]:
    """Compute an operator by the torch target, with its attributes in the form of a file."""
    result: Tensor = OPERATORS[name]([None if array is None else _tensor(array) for array in inputs], held(attributes))
    return (result.numpy(),)


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.require(array, requirements="W"))  # torch warns of read-only arrays


class Simulation:
    """An ONNX graph of one float input, computed node by node; it returns the first output.

    Args:
        model: The model.

    >>> from onnx import TensorProto, helper
    >>> x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 3]) for n in "xy")
    >>> graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    >>> Simulation(helper.make_model(graph))(torch.tensor([[-1.0, 0.0, 2.0]]))
    tensor([[0., 0., 2.]])
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._evaluator = ReferenceEvaluator(
            fuse(model), new_ops=[Conv, MaxPool, Gemm, MatMul, MatMulInteger, MatMulNBits, *OPS]
        )
        self._input = model.graph.input[0].name

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        parts = [
            self._evaluator.run(None, {self._input: part.numpy()})[0] for part in torch.split(x.contiguous(), _BATCH)
        ]
        return torch.from_numpy(np.concatenate(parts))


@dataclass(frozen=True)
class SimulationAgreement:
    """A file in ONNX Runtime compared with the simulation of its graph.

    Args:
        n: The number of inputs.
        answers: The number of predictions that were compared: one per input, more where outputs have positions, 0 for
            outputs without classes.
        agree: The share of equal predictions.
        mean_difference: The mean difference of the outputs, as a share of the largest simulated output.
        max_difference: The largest difference, in the same unit.
    """

    n: int
    answers: int
    agree: float
    mean_difference: float
    max_difference: float


def agreement(
    packed: bytes, inputs: Iterable[Tensor], limit: int = PARITY_INPUTS
) -> tuple[SimulationAgreement, Tensor, Tensor]:
    """Compare a packed file in ONNX Runtime with the simulation of its graph on the first `limit` of the inputs.

    The prediction for an input is the class (second axis) of the largest output.

    Args:
        packed: The packed file.
        inputs: Batches of inputs.
        limit: Inputs at most.

    Returns:
        The comparison, the simulated outputs and the runtime's outputs, each `[n, ...]`.

    Raises:
        ArtifactError: `packed` is not a packed file.
        ExportFailed: ONNX Runtime cannot load the network.
    """
    model = packing.unpack(packed)
    simulation, runtime = Simulation(model), session(model)
    name = runtime.get_inputs()[0].name
    # Dynamic ranges depend on the whole batch, so both must see the same inputs at once.
    dynamic = any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.node)
    simulated: list[Tensor] = []
    returned: list[Tensor] = []
    left = limit
    for x in inputs:
        part = x[:left].contiguous()
        simulated.append(simulation(part))
        for few in torch.split(part, _BATCH if dynamic else len(part)):
            returned.append(torch.from_numpy(runtime.run(None, {name: few.numpy()})[0]))
        left -= len(part)
        if left <= 0:
            break
    expected, outputs = torch.cat(simulated), torch.cat(returned)
    return compared(expected, outputs), expected, outputs


def compared(expected: Tensor, outputs: Tensor) -> SimulationAgreement:
    """Compare outputs with expected outputs of the same shape, `[n, classes, ...]`.

    >>> compared(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[0.0, 0.9], [0.0, 0.1]])).agree
    0.5
    """
    difference = (outputs - expected).abs() / expected.abs().max().clamp_min(1e-12)
    classes = expected.ndim > 1 and expected.shape[1] > 1
    equal = (expected.argmax(1) == outputs.argmax(1)).float() if classes else torch.ones(0)
    return SimulationAgreement(
        len(expected),
        equal.numel(),
        float(equal.mean()) if classes else 1.0,
        float(difference.mean()),
        float(difference.max()),
    )
