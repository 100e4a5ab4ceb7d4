"""What the width of activations costs: ResNet-20 on CIFAR-10, all layers alike, without training.

    python benchmarks/activations.py

Weights of 8 bits, BatchNorm re-estimated. Every number is that of the exported file in ONNX Runtime on the 10,000 test
images, less the untouched network's on the same images, with its 95% interval. Images: see
`benchmarks/cifar10/task.py`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from against import points, untouched

from paretorch.spaces.recipe import Recipe
from paretorch.spaces.techniques.quantize import ACTIVATION_BITS, Quantize
from paretorch.spaces.techniques.recover import Recover


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runner, _, base = untouched(Path(folder))
        for bits in ACTIVATION_BITS:
            steps = [Quantize(layer.name, 8, bits) for layer in runner.structure.layers]
            data = runner.build(Recipe((*steps, Recover("batchnorm"))))
            print(f"{bits:>2}-bit activations {points(runner, data, base):>12} points, {len(data)} bytes", flush=True)


if __name__ == "__main__":
    main()
