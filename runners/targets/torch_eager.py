"""PyTorch without a compiler: the float file node by node, on the CPU or a CUDA device.

It takes two to four times as long as ONNX Runtime. Eager PyTorch has no int8 kernels, so 8-bit activations are refused;
weights of few bits are unpacked when the file is loaded, and computed with as floats. `torch-cuda` has never been run,
for lack of a machine with such a device.
"""

from __future__ import annotations

from functools import partial

import torch

from ...errors import TargetError
from ...spaces.steps import Step
from ...spaces.techniques.quantize import Quantize
from .target import Target
from .torch_graph import load


def make_cpu(name: str) -> Target:
    """The target on the CPU."""
    environment = {"torch": str(torch.__version__)}
    return Target(name, partial(load, device="cpu"), supports, calling_thread=True, environment=environment)


def make_cuda(name: str) -> Target:
    """The target on a CUDA device.

    Raises:
        TargetError: torch sees no such device.
    """
    if not torch.cuda.is_available():
        raise TargetError(f"the target {name} needs a CUDA device, and torch sees none here; choose another target")
    environment = {"torch": str(torch.__version__), "cuda device": torch.cuda.get_device_name()}
    return Target(name, partial(load, device="cuda"), supports, environment=environment)


def supports(step: Step) -> str | None:
    """Why eager PyTorch cannot run a step, None when it can."""
    if isinstance(step, Quantize) and step.activation_bits < 32:
        return (
            f"eager PyTorch has no kernels for {step.activation_bits}-bit activations; weights alone may have few bits"
        )
    return None
