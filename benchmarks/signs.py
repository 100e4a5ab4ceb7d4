"""What one bit a weight costs, with and without training, beside two bits: ResNet-20 on CIFAR-10.

    python benchmarks/signs.py                # without training
    python benchmarks/signs.py --epochs 3     # and with so many epochs of it

All layers but the first and the last, which have 8 bits; 8-bit activations, BatchNorm re-estimated. Every number is
that of the exported file in ONNX Runtime on the 10,000 test images, less the untouched network's on the same images,
with its 95% interval. Images: see `benchmarks/cifar10/task.py`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from against import points, untouched

from paretorch.runners.files import packing
from paretorch.spaces.recipe import Recipe
from paretorch.spaces.steps import Step
from paretorch.spaces.techniques.quantize import ROUNDINGS, Quantize
from paretorch.spaces.techniques.recover import Recover


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=0.0)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 1])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runner, base_file, base = untouched(Path(folder))
        first, *inner, last = [layer.name for layer in runner.structure.layers]
        ways = [(name, name, Recover("batchnorm")) for name in ROUNDINGS]
        if arguments.epochs:
            ways.append(("nearest", f"{arguments.epochs:g} epochs", Recover("finetune", arguments.epochs, 0.02)))
        for bits in arguments.bits:
            for rounding, label, recovery in ways:
                steps: list[Step] = [Quantize(name, 8, 8) for name in (first, last)]
                steps += [Quantize(name, bits, 8, rounding) for name in inner]
                data = runner.build(Recipe((*steps, recovery)))
                onnx_bytes = packing.unpack(data).ByteSize()
                print(
                    f"{bits} bits, {label:<10} {points(runner, data, base):>13} points, {len(data)} bytes packed "
                    f"({len(base_file) / len(data):.1f} times smaller), {onnx_bytes} bytes of model.onnx",
                    flush=True,
                )


if __name__ == "__main__":
    main()
