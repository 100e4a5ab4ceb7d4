"""What the width of activations costs: ResNet-20 on CIFAR-10, all layers alike, without training.

    python benchmarks/activations.py

Weights of 8 bits, BatchNorm re-estimated. Every number is that of the exported file in ONNX Runtime on the 10,000 test images,
less the untouched network's on the same images, with its 95% interval. Images: see `benchmarks/cifar10/task.py`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "cifar10"))
from task import task as cifar10

from paretorch.runners.local import LocalRunner
from paretorch.spaces.recipe import ACTIVATION_BITS, Quantize, Recipe, Recover


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runner = LocalRunner(cifar10(), Path(folder))
        base_file = runner.build(Recipe())
        runner.choose_way([base_file])
        base = runner.scores(base_file, "test")
        print(f"untouched: {100 * base.mean():.2f}%, {len(base_file)} bytes", flush=True)
        for bits in ACTIVATION_BITS:
            steps = [Quantize(layer.name, 8, bits) for layer in runner.structure.layers]
            data = runner.build(Recipe((*steps, Recover("batchnorm"))))
            gained = runner.scores(data, "test") - base
            half = 1.96 * gained.std(ddof=1) / len(gained) ** 0.5
            print(f"{bits:>2}-bit activations {100 * gained.mean():>7.2f} ±{100 * half:.2f} points, {len(data)} bytes", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
