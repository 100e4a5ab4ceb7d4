"""The model that `paretorch register` puts into the MLflow registry: MLflow copies this file and runs the copy.

It needs MLflow, NumPy and ONNX Runtime, and neither paretorch nor torch; so it imports nothing else, and what it must
know stands in the model's configuration. Nothing is pickled.
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
    """Computes `model.onnx` of an exported candidate on the CPU, as it was measured.

    Configuration: `threads`, and `disabled_optimizers` of ONNX Runtime, which keep float layers in float.
    """

    def load_context(self, context: PythonModelContext) -> None:
        folder = Path(context.artifacts["exported"])
        data = (folder / "model.onnx").read_bytes()
        if (
            hashlib.sha256(data).hexdigest()
            != json.loads((folder / "artifact.json").read_text())["sha256"]["model.onnx"]
        ):
            raise ValueError(f"{folder / 'model.onnx'} was changed after it was exported: its SHA-256 is not the one in "
                             "artifact.json; register the candidate again")  # fmt: skip
        config = context.model_config or {}
        options = ort.SessionOptions()
        options.intra_op_num_threads = config["threads"]
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(
            data, options, providers=["CPUExecutionProvider"], disabled_optimizers=config["disabled_optimizers"]
        )
        self._input = self._session.get_inputs()[0].name

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> Any:
        return self._session.run(None, {self._input: np.ascontiguousarray(model_input, np.float32)})[0]


set_model(ExportedNetwork())
