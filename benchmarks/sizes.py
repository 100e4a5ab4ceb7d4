"""What files weigh: ResNet-20 with uniform bits and zeros, packed, as ONNX, entropy-coded, and as arithmetic foretells.

    python benchmarks/sizes.py

The trained weights are those beside `benchmarks/cifar10/task.py`; no image is needed, since bytes do not depend on what
the ranges of 8-bit activations come out as. Shares are those of the untouched network's packed file (model.onnx: of its
own).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from paretorch import Quantize, Recipe, Sparsify, Task
from paretorch.objectives.cost import size_bytes
from paretorch.runners.compression.overhead import measure_overhead
from paretorch.runners.files import packing
from paretorch.runners.files.entropy import zstd_bytes
from paretorch.runners.local import LocalRunner
from paretorch.runners.settings import MeasurementSettings
from paretorch.spaces.rules import Rule
from paretorch.spaces.space import Space

CIFAR10 = Path(__file__).parent / "cifar10"
BITS, ZEROS = (8, 6, 4, 3, 2), (0.0, 0.5, 0.9)


def main() -> None:
    sys.path.insert(0, str(CIFAR10))
    from task import ResNet

    network = ResNet()
    network.load_state_dict(load_file(CIFAR10 / "resnet20.safetensors"))
    torch.manual_seed(0)
    noise = TensorDataset(torch.randn(64, 3, 32, 32), torch.zeros(64, dtype=torch.long))
    task = Task("resnet20", lambda: network.eval(), train=noise, validation=noise, test=noise)
    with tempfile.TemporaryDirectory() as folder:
        runner = LocalRunner(task, Path(folder), MeasurementSettings(calibration_images=64))
        names = [layer.name for layer in runner.structure.layers]
        untouched = runner.build(Recipe())
        space = Space(weight_bits=(Rule(BITS),), activation_bits=(Rule((8, 32)),), sparsity=(Rule(ZEROS),))
        overhead = measure_overhead(runner.builder, len(untouched), space.axes(runner.structure))
        whole = packing.unpack(untouched).ByteSize()
        print(
            f"untouched: packed {len(untouched)}, model.onnx {whole}, "
            f"zstd {zstd_bytes(packing.unpack(untouched), untouched, runner.zstd_level)}\n"
        )
        print("bits zeros activations  packed           foretold          model.onnx        zstd")
        for bits in BITS:
            for zeros in ZEROS:
                for activations in (32, 8):
                    steps = [Quantize(name, bits, activations) for name in names]
                    steps += [Sparsify(name, zeros) for name in names if zeros]
                    recipe = Recipe(tuple(steps))
                    packed = runner.build(recipe, recovery=False)
                    model = packing.unpack(packed)
                    foretold = size_bytes(runner.structure, recipe, overhead)
                    zstd = zstd_bytes(model, packed, runner.zstd_level)
                    print(
                        f"{bits:<5}{zeros:<6.0%}{activations:<13}{len(packed):>6} "
                        f"({len(packed) / len(untouched):.3f})  {foretold:>6} "
                        f"({foretold / len(packed) - 1:+.2%})  {model.ByteSize():>7} ({model.ByteSize() / whole:.3f})  "
                        f"{zstd:>6} ({zstd / len(untouched):.3f})",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
