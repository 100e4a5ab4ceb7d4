"""The latency of the same files on every target.

    python benchmarks/targets.py

torchvision's resnet18 and mobilenet_v2 at 224 pixels with random weights (latency does not depend on them), untouched,
in int8, and with 4-bit weights alone, one image on one thread. Each is timed in turns with the untouched file in ONNX
Runtime, so that one column can be compared with another.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch.utils.data import TensorDataset

from paretorch.errors import ParetorchError
from paretorch.runners.files import packing
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import MeasurementSettings
from paretorch.runners.targets.catalog import as_target
from paretorch.runners.targets.latency import latency
from paretorch.runners.task import Task
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.quantize import Quantize

TARGETS = ("onnxruntime", "openvino", "torch")
WIDTHS = {"float": None, "int8": (8, 8), "4-bit weights": (4, 32)}


def files(name: str) -> tuple[dict[str, bytes], np.ndarray]:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().eval()
    data = TensorDataset(torch.randn(32, 3, 224, 224), torch.zeros(32, dtype=torch.long))
    with tempfile.TemporaryDirectory() as folder:
        runner = LocalRunner(
            Task(name, lambda: model, data, data), Path(folder), MeasurementSettings(calibration_images=32)
        )
        layers = [layer.name for layer in runner.structure.layers]
        recipes = {
            kind: Recipe(tuple(Quantize(x, *bits) for x in layers) if bits else ()) for kind, bits in WIDTHS.items()
        }
        made = {kind: packing.onnx_bytes(runner.build(recipe)) for kind, recipe in recipes.items()}
    return made, runner.builder.calibration[:1].numpy()


def main() -> None:
    reference = as_target("onnxruntime")
    for name in ("resnet18", "mobilenet_v2"):
        made, x = files(name)
        base = reference.load(made["float"], 1)
        for kind, model in made.items():
            for target in TARGETS:
                try:
                    network = as_target(target).load(model, 1)
                except ParetorchError as error:
                    print(f"{name:13}{kind:15}{target:13}{str(error).split(';')[0]}", flush=True)
                    continue
                ms, ratio = latency(network, base, x, seconds=8.0)
                speed = f"{1 / ratio.value:.2f}x [{1 / ratio.high:.2f}, {1 / ratio.low:.2f}]"
                print(f"{name:13}{kind:15}{target:13}{ms.value:7.2f} ms  {speed}", flush=True)


if __name__ == "__main__":
    main()
