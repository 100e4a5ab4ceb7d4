"""The model that `paretorch register` puts into the MLflow registry: MLflow copies this file and runs the copy.

It imports MLflow, NumPy and ONNX Runtime, but neither paretorch nor torch; its settings are in the model's
configuration. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class ExportedNetwork(PythonModel):
    """Runs `model.onnx` of an exported candidate on the CPU, with the settings it was measured with.

    The model's configuration holds `threads`, and `disabled_optimizers`: the optimizers of ONNX Runtime that would turn
    float layers into quantized ones.
    """

    def load_context(self, context: PythonModelContext) -> None:
        folder = Path(context.artifacts["exported"])
        data = (folder / "model.onnx").read_bytes()
        known = json.loads((folder / "artifact.json").read_text())["sha256"]["model.onnx"]
        if hashlib.sha256(data).hexdigest() != known:
            raise ValueError(
                f"{folder / 'model.onnx'} was changed after it was exported: its SHA-256 is not the one in "
                "artifact.json; register the candidate again"
            )
        self._session = _session(data, context.model_config or {})
        self._input = self._session.get_inputs()[0].name

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> Any:
        return self._session.run(None, {self._input: np.ascontiguousarray(model_input, np.float32)})[0]


def _session(model: bytes, config: dict[str, Any]) -> ort.InferenceSession:
    """A session that computes 8-bit products exactly where ONNX Runtime can."""
    try:
        return _created(model, config, exact=True)
    except Exception as error:  # ONNX Runtime raises one class per status, with no other common base
        # With exact products, ONNX Runtime 1.32 rejects weights that several layers share.
        if "replace the existing tensor" not in str(error):
            raise
        return _created(model, config, exact=False)


def _created(model: bytes, config: dict[str, Any], exact: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = config["threads"]
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if exact:
        # Without VNNI, x86 accumulates products of uint8 and int8 in 16 bits, which saturate. With this setting, ONNX
        # Runtime converts the weights to uint8 there, whose kernels are exact; elsewhere it has no effect.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=config["disabled_optimizers"]
    )


set_model(ExportedNetwork())
