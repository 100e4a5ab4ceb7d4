"""Where a network runs in the end: the hardware and the runtime that latency and accuracy are measured on.

A `Target` is a handful of functions under a name. The protocol is this small on purpose: whoever can turn the bytes of an
ONNX file into a function of arrays has a target, and everything else (pairs, medians, intervals, scores) is done here,
the same way for all. A target without a device beside it, the roofline of a profile (`analytic`), computes milliseconds
from the file instead of running it there; what it predicts is then that of ONNX Runtime.

What each one is good for, and its traps (all measured, on x86 with VNNI and AMX):

- `onnxruntime`: the default, and the fastest for small networks, because a call costs it the least.
- `openvino`: large networks; an int8 resnet18 takes about 0.93 and an int8 mobilenet_v2 0.95 of its time in ONNX Runtime, floats
  the same (`benchmarks/targets.py`). Left to itself it computes floats in bfloat16, and the activations of weight-only
  linear layers in int8, whatever the file says; both are turned off here, and whoever deploys must do the same. A call
  costs about 0.02 ms. Convolutions with affine weights compute in floats there. It fuses a convolution with the Add behind it, without the rounding between the two, so that
  outputs of int8 networks with skips differ by about 1% of the largest.
- `torch`, `torch-cuda`: the float file node by node, as a program in eager PyTorch runs; twice to four times as long as in
  ONNX Runtime. There are no int8 kernels there, so 8-bit activations are refused; weights of few bits are unpacked when
  the file is loaded and compute as floats. `torch-cuda` was never run: no machine with such a device was at hand.

ExecuTorch is no target: it compiles torch programs and not the ONNX file that ships, and what it compiled of a CIFAR
ResNet did not run (`slice_copy: tensors have different dim orders`).
"""

from __future__ import annotations

import difflib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ExportFailed, TargetError
from ...objectives.measurement import Estimate
from ...spaces.steps import Step
from ...spaces.techniques.quantize import Quantize
from . import latency as measure
from .runtime import session

Network = Callable[[NDArray[Any]], NDArray[Any]]
DEFAULT = "onnxruntime"


def everything(step: Step) -> str | None:
    """What a target that runs every step says: nothing."""
    return None


@dataclass(frozen=True)
class Target:
    """Something that runs ONNX files, or that knows how long it would.

    name: letters, digits, `-_.`; the name of its results. load: from the bytes of an ONNX file and a number of CPU
    threads to a function from a batch of inputs to outputs, which may be called from several threads at once; it raises
    `ExportFailed` for a file that it cannot run. supports: why a step of a recipe cannot be run there, None when it can;
    a study asks it of its whole space before the first trial. milliseconds: of a run of an ONNX file on so many inputs,
    by arithmetic; None: it is timed. calling_thread: with one thread everything is computed in the thread that calls,
    whose CPU time is then what is measured; else the wall clock is. environment: versions and devices, for the record.
    profile: plain data that makes such a target again, of one that has no name of its own. int8_products: whether the
    products of two activations, which are those of attention, are faster there in int8 than in floats; then the files made
    for it have them so where the projections have 8-bit activations, and what linear layers over tokens read is int8 around
    zero wherever that costs little (`onnx_export`).

        >>> check_target(Target("mine", load=lambda model, threads: my_runtime(model).run))  # doctest: +SKIP
    """

    name: str
    load: Callable[[bytes, int], Network]
    supports: Callable[[Step], str | None] = everything
    milliseconds: Callable[[bytes, int], float] | None = None
    calling_thread: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    profile: Mapping[str, Any] | None = None
    int8_products: bool = False

    @property
    def spec(self) -> str | dict[str, Any]:
        """What `as_target` makes it from again: its name, or its profile; JSON can hold either."""
        return self.name if self.profile is None else dict(self.profile)

    def latency(
        self,
        candidate: bytes,
        baseline: Network,
        batch: NDArray[Any],
        baseline_ms: float | None = None,
        seconds: float = 0.5,
        threads: int = 1,
    ) -> tuple[Estimate, Estimate]:
        """`(milliseconds, ratio to the baseline)` of an ONNX file: see `measure.latency`; exact where computed."""
        if self.milliseconds is not None:
            found = self.milliseconds(candidate, len(batch))
            return Estimate.exact(found), Estimate.exact(found / (baseline_ms or found))
        return self._paired(self.load(candidate, threads), baseline, batch, baseline_ms, seconds, threads)

    def baseline_latency(
        self, baseline: bytes, batch: NDArray[Any], seconds: float = 0.5, threads: int = 1
    ) -> Estimate:
        """The milliseconds of the file that all others are compared with: two measurements, and what both hold."""
        if self.milliseconds is not None:
            return Estimate.exact(self.milliseconds(baseline, len(batch)))
        network = self.load(baseline, threads)
        (a, _), (b, _) = (self._paired(network, network, batch, None, seconds, threads) for _ in range(2))
        return Estimate((a.value + b.value) / 2, min(a.low, b.low), max(a.high, b.high), a.n + b.n)

    def _paired(
        self,
        candidate: Network,
        baseline: Network,
        batch: NDArray[Any],
        baseline_ms: float | None,
        seconds: float,
        threads: int,
    ) -> tuple[Estimate, Estimate]:
        clock = time.thread_time_ns if threads == 1 and self.calling_thread else time.perf_counter_ns
        return measure.latency(candidate, baseline, batch, baseline_ms, seconds, clock)


def as_target(spec: Target | str | Mapping[str, Any]) -> Target:
    """The target that a name or a profile stands for; raises `TargetError`, with what to do.

    >>> as_target("onnxruntime").name
    'onnxruntime'
    """
    if isinstance(spec, Target):
        return spec
    if isinstance(spec, str):
        if spec in TARGETS:
            return TARGETS[spec]()
        close = difflib.get_close_matches(spec, TARGETS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise TargetError(f"there is no target {spec!r}; choose from {', '.join(TARGETS)}, or name the .yaml file of a profile{hint}")  # fmt: skip
    from .roofline import Profile, analytic

    return analytic(Profile.from_dict(spec))


def _onnxruntime() -> Target:
    import onnxruntime

    return Target(DEFAULT, _load_onnxruntime, calling_thread=True, environment={"onnxruntime": onnxruntime.__version__})


def _load_onnxruntime(model: bytes, threads: int) -> Network:
    runtime = session(model, threads)
    name = runtime.get_inputs()[0].name

    def run(batch: NDArray[Any]) -> NDArray[Any]:
        try:
            return runtime.run(None, {name: batch})[0]  # type: ignore[no-any-return]
        except Exception as error:  # ONNX Runtime raises a class per status, without a common base but this
            raise ExportFailed(f"the exported network does not run in ONNX Runtime: {error}") from error

    return run


def _openvino() -> Target:
    try:
        import openvino
    except ImportError as error:
        raise TargetError(f"the target openvino needs OpenVINO ({error}): pip install 'paretorch[openvino]'") from error
    core = openvino.Core()
    about = {"openvino": openvino.__version__, "openvino device": core.get_property("CPU", "FULL_DEVICE_NAME")}

    def load(model: bytes, threads: int) -> Network:
        options = {
            "INFERENCE_PRECISION_HINT": "f32",  # bfloat16 otherwise, where the processor has it
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # else linear layers of packed weights get int8 activations
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
        }
        try:
            compiled = core.compile_model(core.read_model(model, b""), "CPU", options)
        except Exception as error:  # OpenVINO raises RuntimeError and what its frontends raise
            raise ExportFailed(f"OpenVINO cannot load the exported network: {_brief(error)}") from error
        own = threading.local()  # a request holds the tensors of one run

        def run(batch: NDArray[Any]) -> NDArray[Any]:
            if not hasattr(own, "request"):
                own.request = compiled.create_infer_request()
            try:
                # Shared, a call costs a quarter; the outputs are copied because the next run overwrites them.
                found = own.request.infer(np.ascontiguousarray(batch), share_inputs=True, share_outputs=True)[0]
            except Exception as error:
                raise ExportFailed(f"the exported network does not run in OpenVINO: {_brief(error)}") from error
            return np.array(found)

        return run

    def supports(step: Step) -> str | None:
        if isinstance(step, Quantize) and step.activation_bits < 8:
            return f"OpenVINO has no {step.activation_bits}-bit activations, and crashes where a file has some; choose 8, 16 or 32"
        return None

    return Target("openvino", load, supports, calling_thread=True, environment=about, int8_products=True)


def _torch(device: str) -> Target:
    import torch

    name = "torch" if device == "cpu" else "torch-cuda"
    about = {"torch": str(torch.__version__)}
    if device == "cuda":
        if not torch.cuda.is_available():
            raise TargetError("the target torch-cuda needs a CUDA device, and torch sees none here; choose another target")  # fmt: skip
        about["cuda device"] = torch.cuda.get_device_name()
    from .torch_graph import load

    def supports(step: Step) -> str | None:
        if isinstance(step, Quantize) and step.activation_bits < 32:
            return f"eager PyTorch has no kernels for {step.activation_bits}-bit activations; weights alone may have few bits"  # fmt: skip
        return None

    return Target(name, lambda model, threads: load(model, threads, device), supports, calling_thread=device == "cpu", environment=about)  # fmt: skip


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[-500:]


# By name, what makes the target; what it needs is imported only then.
TARGETS: dict[str, Callable[[], Target]] = {
    DEFAULT: _onnxruntime,
    "openvino": _openvino,
    "torch": lambda: _torch("cpu"),
    "torch-cuda": lambda: _torch("cuda"),
}
