"""What an exported graph means, computed without the runtime that ships it: the other side of the parity check.

Quantize and Dequantize are carried out as ONNX writes them down (divide, round half to even, saturate, and back to
floats); a layer between quantized numbers adds up whole numbers and is requantised where the runtime's are
(`integer`). What is left computes on floats, node by node, by ONNX's own reference implementation; the few operators
that it takes minutes for are those of the torch target. ONNX Runtime optimizes the same graph in its own way, and
`agreement` says how often both come to the same answer.

Where every layer is quantized they agree to the last bit. Where floats are added up they do not: in another order a
number at the border of two steps falls to the other side. So answers are compared, and the size of the differences is
told beside them.
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

_BATCH = 16  # the reference keeps every tensor of the network until the end


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
    """ONNX Runtime's product with packed 4-bit weights, which ONNX does not know, by torch on the unpacked ones."""

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
    """What the torch target makes of an operator, with the attributes as the file holds them."""
    result: Tensor = OPERATORS[name]([None if array is None else _tensor(array) for array in inputs], held(attributes))
    return (result.numpy(),)


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.require(array, requirements="W"))  # torch warns of arrays that must not be written


class Simulation:
    """An ONNX graph, computed as it is written. One float input, the first output counts.

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
    """A file in ONNX Runtime against the simulation of its graph.

    n: inputs. answers: how many answers were compared (one per input, more where outputs have positions); 0 for outputs
    without classes. agree: the share of equal ones. mean_difference, max_difference: of the outputs, as a share of the
    largest simulated output.
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

    Gives the comparison, the simulated outputs and the runtime's, each `[n, ...]`. The answer to an input is the class
    (second axis) of the largest output. Raises `ArtifactError`, and `ExportFailed` when the file does not load.
    """
    model = packing.unpack(packed)
    simulation, runtime = Simulation(model), session(model)
    name = runtime.get_inputs()[0].name
    # Where ranges are found at run time, both must see the same inputs at once.
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
    """Outputs against expected outputs of the same shape, `[n, classes, ...]`.

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
