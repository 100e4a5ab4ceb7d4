"""The range of each activation on calibration inputs, and the grid of integers that is laid over it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from ...errors import ExportFailed
from ..targets.runtime import session

_UNSIGNED = {4: TensorProto.UINT4, 8: TensorProto.UINT8, 16: TensorProto.UINT16}


def activation_ranges(
    model: onnx.ModelProto, names: Sequence[str], calibration: Sequence[Tensor]
) -> dict[str, tuple[float, float]]:
    """The range of each tensor: the mean over the batches of their minima and maxima (Jacob et al. 2018).

    The reductions are part of the graph, so that only two numbers per tensor and batch leave the runtime.

    Args:
        model: The float network. Its weights are the quantized ones already, for which the ranges are measured.
        names: The tensors.
        calibration: Batches of inputs.

    Returns:
        By tensor its lowest and highest value.

    Raises:
        ExportFailed: A tensor holds NaN or infinity.
    """
    probe = _probe(model, names)
    runner = session(probe, threads=max(1, torch.get_num_threads()))
    lows, highs = [], []
    outputs = [f"{name}_{which}" for which in ("min", "max") for name in names]
    for batch in calibration:
        extremes = np.array(runner.run(outputs, {probe.graph.input[0].name: batch.numpy()}), dtype=np.float64)
        lows.append(extremes[: len(names)])
        highs.append(extremes[len(names) :])
    low, high = np.mean(lows, 0), np.mean(highs, 0)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ExportFailed("the compressed network gives NaN or infinity on the calibration inputs")
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}


def _probe(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The model with the minimum and the maximum of each tensor as outputs."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    for name in names:
        for which in ("min", "max"):
            kind = f"Reduce{which.capitalize()}"
            probe.graph.node.append(helper.make_node(kind, [name], [f"{name}_{which}"], keepdims=0))
            probe.graph.output.append(helper.make_tensor_value_info(f"{name}_{which}", TensorProto.FLOAT, []))
    return probe


def grid(low: float, high: float, bits: int, signed: bool) -> tuple[int, float, int]:
    """Type, scale and zero point of a range: unsigned, or int8 around zero where `signed` and there are negative
    numbers.

    OpenVINO's kernels for products of activations know no zero point; with one they compute in floats.

    Example:
        >>> kind, scale, zero = grid(-1.0, 14.0, 4, signed=False)
        >>> TensorProto.DataType.Name(kind), scale, zero
        ('UINT4', 1.0, 1)
    """
    low, high = min(0.0, low), max(0.0, high)
    if signed and low < 0:
        return TensorProto.INT8, max(max(-low, high) / 127.0, 1e-8), 0
    most = 2**bits - 1
    scale = max((high - low) / most, 1e-8)
    return _UNSIGNED[bits], scale, int(np.clip(round(-low / scale), 0, most))


def even(low: float, high: float) -> bool:
    """Whether steps around zero are at most half a bit coarser than those of the range itself.

    >>> even(-1.0, 2.0), even(-0.2, 5.0)
    (True, False)
    """
    return 2 * max(-low, high) < math.sqrt(2) * (high - low)
