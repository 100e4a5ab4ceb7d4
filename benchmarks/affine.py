"""What one scale and one zero point for a whole weight cost, beside a scale per output channel.

    python benchmarks/affine.py                    # bytes, accuracy and time: ResNet-20 on CIFAR-10, without training
    python benchmarks/affine.py --epochs 1                  # and with
    python benchmarks/affine.py kernels                     # time alone: torchvision's networks and linear layers
    python benchmarks/affine.py kernels --target openvino

ResNet-20: all layers at the same bits, 8-bit activations, BatchNorm re-estimated; points are those of the exported file
in ONNX Runtime on the 10,000 test images, less the untouched network's on the same images, with their 95% interval.
Images: see `benchmarks/cifar10/task.py`. Times are shares of the FP32 file's, in turns with it, on one thread: one
image (of 224 pixels, random weights for torchvision's networks), or 16 rows for the linear layers.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
import torchvision
from against import points, untouched
from torch import nn
from torch.utils.data import TensorDataset

from paretorch import Task
from paretorch.runners.compression.library import LayerLibrary
from paretorch.runners.files import packing
from paretorch.runners.graphs.onnx_export import batch_of
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import MeasurementSettings
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.quantize import SCHEMES, Quantize
from paretorch.spaces.techniques.recover import Recover


def share(runner: LocalRunner, packed: bytes, base: bytes, batch: int, seconds: float) -> str:
    """The time of a packed file as a share of another's, with its interval."""
    candidate, untouched = (packing.onnx_bytes(data) for data in (packed, base))
    inputs = batch_of(runner.builder.example, batch)
    _, found = runner.target.latency(candidate, runner.target.load(untouched, 1), inputs, seconds=seconds)
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def accuracy(folder: Path, seconds: float, epochs: float) -> None:
    runner, base_file, base = untouched(folder)
    print(f"load {os.getloadavg()[0]:.1f}", flush=True)
    print("| bits, how | scheme | bytes | points | time |\n|---|---|---|---|---|", flush=True)
    untrained = Recover("batchnorm")
    ways = [
        (bits, rounding, untrained)
        for bits, rounding in ((8, "nearest"), (4, "nearest"), (4, "gptq"), (3, "nearest"), (3, "gptq"))
    ]
    if epochs:
        ways.append((3, "nearest", Recover("finetune", epochs, 0.02)))
    for bits, rounding, recovery in ways:
        for scheme in SCHEMES:
            steps = [Quantize(layer.name, bits, 8, rounding, scheme=scheme) for layer in runner.structure.layers]
            data = runner.build(Recipe((*steps, recovery)))
            how = f"{recovery.epochs:g} epochs" if recovery.epochs else rounding
            print(
                f"| {bits}, {how} | {scheme} | {len(data):,} | {points(runner, data, base)} | "
                f"{share(runner, data, base_file, 1, seconds)} |",
                flush=True,
            )


def kernels(folder: Path, seconds: float, target: str) -> None:
    linear = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 64))
    networks = {name: (torchvision.models.get_model(name), (3, 224, 224), 1) for name in ("resnet18", "mobilenet_v2")}
    print(f"{target}; load {os.getloadavg()[0]:.1f}\n| network | {' | '.join(SCHEMES)} |\n|---|---|---|", flush=True)
    for name, (model, shape, batch) in {**networks, "linear layers": (linear, (512,), 16)}.items():
        images = TensorDataset(torch.randn(16, *shape), torch.zeros(16, dtype=torch.long))
        task = Task(name, lambda model=model: model.eval(), train=images, validation=images)
        runner = LocalRunner(
            task, folder, MeasurementSettings(calibration_images=16), target=target, library=LayerLibrary(limit=0)
        )
        base_file = runner.build(Recipe())
        found = []
        for scheme in SCHEMES:
            steps = [Quantize(layer.name, 8, 8, ranges="minmax", scheme=scheme) for layer in runner.structure.layers]
            found.append(share(runner, runner.build(Recipe(tuple(steps))), base_file, batch, seconds))
        print(f"| {name} | {' | '.join(found)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["accuracy", "kernels"], default="accuracy")
    parser.add_argument("--epochs", type=float, default=0.0, help="of training, of accuracy")
    parser.add_argument("--target", default="onnxruntime", help="of kernels")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each timing")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what == "kernels":
            kernels(Path(folder), arguments.seconds, arguments.target)
        else:
            accuracy(Path(folder), arguments.seconds, arguments.epochs)


if __name__ == "__main__":
    main()
