"""OpenVINO on the CPU, for large networks.

On x86 with VNNI and AMX an int8 resnet18 takes about 0.93 and an int8 mobilenet_v2 0.95 of its time in ONNX Runtime,
and floats take the same (`benchmarks/targets.py`). A call costs about 0.02 ms. Its peculiarities, all measured:

- By default it computes floats in bfloat16, and the activations of weight-only linear layers in int8, whatever the file
  says. Both are turned off here, and must be turned off where the file is deployed.
- Convolutions with affine weights compute in floats.
- It fuses a convolution with the Add behind it, without the rounding between the two, so that outputs of int8 networks
  with skip connections differ by about 1% of the largest.
- It has no activations of fewer than 8 bits, and crashes where a file has some.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ExportFailed, TargetError
from ...spaces.steps import Step
from ...spaces.techniques.quantize import Quantize
from .target import Network, Target

_OPTIONS = {
    "INFERENCE_PRECISION_HINT": "f32",  # bfloat16 otherwise, where the processor has it
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # else linear layers of packed weights get int8 activations
    "NUM_STREAMS": 1,
}


def make(name: str) -> Target:
    """The target.

    Raises:
        TargetError: OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise TargetError(f"the target openvino needs OpenVINO ({error}): pip install 'paretorch[openvino]'") from error
    core = openvino.Core()

    def load(model: bytes, threads: int) -> Network:
        try:
            compiled = core.compile_model(
                core.read_model(model, b""), "CPU", _OPTIONS | {"INFERENCE_NUM_THREADS": threads}
            )
        except Exception as error:  # OpenVINO raises RuntimeError and what its frontends raise
            raise ExportFailed(f"OpenVINO cannot load the exported network: {_brief(error)}") from error
        return _network(compiled)

    about = {"openvino": openvino.__version__, "openvino device": core.get_property("CPU", "FULL_DEVICE_NAME")}
    return Target(name, load, supports, calling_thread=True, environment=about, int8_products=True)


def supports(step: Step) -> str | None:
    """Why OpenVINO cannot run a step, None when it can."""
    if isinstance(step, Quantize) and step.activation_bits < 8:
        return (
            f"OpenVINO has no {step.activation_bits}-bit activations, and crashes where a file has some; "
            "choose 8, 16 or 32"
        )
    return None


def _network(compiled: Any) -> Network:
    """A function that runs a compiled model, from several threads at once if need be."""
    own = threading.local()  # by thread, because a request holds the tensors of one run

    def run(batch: NDArray[Any]) -> NDArray[Any]:
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        try:
            # Sharing quarters the cost of a call. The outputs are copied, because the next run overwrites them.
            outputs = own.request.infer(np.ascontiguousarray(batch), share_inputs=True, share_outputs=True)
        except Exception as error:  # as above
            raise ExportFailed(f"the exported network does not run in OpenVINO: {_brief(error)}") from error
        return np.array(outputs[0])

    return run


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[-500:]
